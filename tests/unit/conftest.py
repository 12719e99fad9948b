from hypothesis import HealthCheck, settings

# A deadline asserts wall-clock time, and a loaded machine breaks it, as it does a limit on how long examples take to
# make. The same examples at every run; `make fuzz` goes looking for others.
settings.register_profile("headrace", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("headrace")
