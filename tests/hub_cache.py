"""A cache of the Hugging Face hub, made by hand as its documentation describes it: blobs, refs, snapshots."""

from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def write_hub_cache(home, model, directory):
    """Put the files of a directory into the cache of `HF_HOME=home`, as `model`. The path of its snapshot."""
    repo = home / "hub" / f"models--{model.replace('/', '--')}"
    snapshot = repo / "snapshots" / COMMIT
    for folder in (repo / "blobs", repo / "refs", snapshot):
        folder.mkdir(parents=True)
    (repo / "refs" / "main").write_text(COMMIT)
    for number, file in enumerate(sorted(each for each in directory.iterdir() if each.is_file())):
        (repo / "blobs" / str(number)).symlink_to(file.resolve())
        (snapshot / file.name).symlink_to(Path("../../blobs", str(number)))
    return snapshot
