"""Files that are read anew when they change."""

import os

import pytest
from structlog.testing import capture_logs

from planes.security.files import Reloaded, UnusableFile, read_secret

LATER = 2_000_000_000


@pytest.fixture
def secret(tmp_path):
    file = tmp_path / "secret"
    file.write_text("first\n")
    return file


def test_what_has_not_changed_is_not_read_again(secret):
    read = []
    reloaded = Reloaded([secret], lambda: read.append(secret.read_text()))
    reloaded()
    reloaded()
    assert read == ["first\n"]


def test_a_changed_file_counts_at_the_next_use(secret):
    reloaded = Reloaded([secret], lambda: read_secret(secret))
    assert reloaded() == "first"
    secret.write_text("second, longer\n")
    with capture_logs() as logs:
        assert [reloaded(), reloaded()] == ["second, longer"] * 2
    assert [line["event"] for line in logs] == ["secret_files.reloaded"]


def test_a_file_of_equal_length_counts_by_its_time(secret):
    reloaded = Reloaded([secret], lambda: read_secret(secret))
    secret.write_text("other\n")
    os.utime(secret, (LATER, LATER))
    assert reloaded() == "other"


def test_a_link_that_points_elsewhere_is_a_change(secret, tmp_path):
    (tmp_path / "next").write_text("other\n")
    link = tmp_path / "link"
    link.symlink_to(secret)
    reloaded = Reloaded([link], lambda: read_secret(link))
    link.unlink()
    link.symlink_to(tmp_path / "next")
    assert reloaded() == "other"


@pytest.mark.parametrize("spoil", [lambda file: file.unlink(), lambda file: file.write_bytes(b"\xff\xfe"), None])
def test_an_unusable_new_file_is_told_once_without_its_text_and_the_old_one_counts(secret, spoil):
    reloaded = Reloaded([secret], lambda: read_secret(secret))
    (spoil or (lambda file: file.write_text("\n")))(secret)
    with capture_logs() as logs:
        assert [reloaded(), reloaded()] == ["first"] * 2
    (line,) = logs
    assert (line["event"], line["log_level"]) == ("secret_files.unusable", "warning")
    assert str(secret) in line["reason"]
    secret.write_text("third\n")
    os.utime(secret, (LATER, LATER))
    assert reloaded() == "third"


def test_a_file_that_is_unusable_from_the_start_is_an_error(tmp_path):
    with pytest.raises(UnusableFile, match=r"nothing: cannot be read: No such file"):
        Reloaded([tmp_path / "nothing"], lambda: read_secret(tmp_path / "nothing"))


def test_a_file_too_long_for_a_secret_is_refused(secret):
    secret.write_text("x" * 20_000)
    with pytest.raises(UnusableFile, match="more than 16384 bytes"):
        read_secret(secret)


def test_spaces_within_a_secret_stay(secret):
    secret.write_text(" a b \r\n")
    assert read_secret(secret) == " a b "
