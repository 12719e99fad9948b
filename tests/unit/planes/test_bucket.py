import pytest

from planes.bucket import covers


@pytest.mark.parametrize(
    ("pattern", "subject", "is_covered"),
    [
        ("$O.b.C.>", "$O.b.C.>", True),
        ("$O.b.>", "$O.b.C.>", True),
        (">", "$O.b.C.>", True),
        ("$O.*.C.>", "$O.b.C.>", True),
        ("$O.b.C.*", "$O.b.C.>", False),
        ("$O.b.M.>", "$O.b.C.>", False),
        ("$O.b.C.x.>", "$O.b.C.>", False),
        ("$O.b.C", "$O.b.C.>", False),
    ],
)
def test_a_pattern_covers_what_falls_under_it(pattern, subject, is_covered):
    assert covers(pattern, subject) is is_covered
