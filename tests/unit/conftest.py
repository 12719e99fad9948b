from hypothesis import settings

# A deadline asserts wall-clock time, and a loaded machine breaks it.
settings.register_profile("headrace", deadline=None)
settings.load_profile("headrace")
