from hypothesis import HealthCheck, settings

# A deadline asserts wall-clock time, and a loaded machine breaks it, as it does a limit on how long examples take to
# make. The same examples at every run: a change is judged by what it changes. `make fuzz` draws others.
settings.register_profile("explore", deadline=None, max_examples=1000)
settings.register_profile("headrace", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("headrace")
