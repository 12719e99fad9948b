"""The chart without helm: its values, their schema, and what its templates name. `make helm-test` renders it."""

import json
import re
from pathlib import Path

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).parents[2]
CHART = ROOT / "docker" / "helm" / "headrace"
VALUES = yaml.safe_load((CHART / "values.yaml").read_text())
SCHEMA = json.loads((CHART / "values.schema.json").read_text())
EXAMPLES = sorted((ROOT / "tests" / "helm").glob("*.yaml"))
TEMPLATES = "\n".join(path.read_text() for path in sorted((CHART / "templates").iterdir()))


def merged(defaults, own):
    """As helm does it: maps into each other, all else replaced."""
    if isinstance(defaults, dict) and isinstance(own, dict):
        return defaults | {key: merged(defaults.get(key), value) for key, value in own.items()}
    return own


def complaints(own):
    found = jsonschema.Draft202012Validator(SCHEMA).iter_errors(merged(VALUES, own))
    return ["/".join(map(str, error.absolute_path)) for error in found]


def test_the_schema_is_one():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_values_that_are_right_pass(path):
    assert complaints(yaml.safe_load(path.read_text())) == []


@pytest.mark.parametrize(
    ("own", "where"),
    [
        ({"secure": {}}, ""),
        ({"gateway": {"replicas": "two"}}, "gateway/replicas"),
        ({"gateway": {"autoscaling": {"kind": "keda"}}}, "gateway/autoscaling/kind"),
        ({"worker": {"gpus": 1}}, "worker"),
        ({"worker": {"role": "prefill"}}, "worker"),
        ({"worker": {"shm": "8 GB"}}, "worker/shm"),
        ({"workers": {"decode": {"role": "decoder"}}}, "workers/decode/role"),
        ({"workers": {"more": {"replicas": 2}}}, "workers/more"),
        ({"workers": {"etcd": {"role": "both"}}}, "workers"),
        ({"networkPolicy": {"clients": [{"podselector": {}}]}}, "networkPolicy/clients/0"),
    ],
)
def test_values_that_are_wrong_are_refused(own, where):
    assert set(complaints(own)) == {where}


def test_every_map_of_the_values_refuses_what_is_misspelt():
    def maps(values, path):
        yield path
        for key, value in values.items():
            if isinstance(value, dict) and value and key not in ("resources", "workers"):
                yield from maps(value, (*path, key))

    for path in maps(VALUES, ()):
        own = {"misspelt_key": {}}
        for key in reversed(path):
            own = {key: own}
        assert complaints(own), path


def test_every_value_is_used_and_every_used_value_is_there():
    def leaves(values):
        for key, value in values.items():
            yield key
            if isinstance(value, dict) and key not in ("resources", "workers"):
                yield from leaves(value)

    unused = {key for key in leaves(VALUES) if not re.search(rf'[."]{key}\b', TEMPLATES)}
    assert unused - {"requests", "limits", "repository", "maxSurge", "issuerRef", "kind"} == set()
    paths = {tuple(path.split(".")[1:]) for path in re.findall(r"\.Values((?:\.\w+)+)", TEMPLATES)}
    for path in paths:
        at = VALUES
        for key in path:
            assert key in at, path
            at = at[key]


def test_every_variable_is_a_setting_of_its_process():
    reference = (ROOT / "docs" / "reference.md").read_text()
    named = set(re.findall(r"HEADRACE_[A-Z_]+\b", TEMPLATES)) - {"HEADRACE_NATS_", "HEADRACE_CACHE"}
    assert {name for name in named if f"`{name}`" not in reference} == set()
    for suffix in re.findall(r"^([A-Z_]+): \{path: nats", TEMPLATES, flags=re.MULTILINE):
        assert f"`HEADRACE_NATS_{suffix}`" in reference


def test_the_version_is_the_projects():
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert f'version = "{chart["appVersion"]}"' in (ROOT / "pyproject.toml").read_text()


def test_the_alert_rules_are_those_that_are_tested():
    assert (CHART / "files" / "alerts.yml").resolve() == ROOT / "docker" / "observability" / "alerts.yml"
