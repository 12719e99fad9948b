"""What is in the images, what they say of themselves, and what they refuse."""

import tomllib

import pytest

from tests.docker.commands import LOCKED, ROOT, Fleet, docker, inspected, run

IMAGES = ("headrace/etcd", "headrace/nats", "headrace/gateway", "headrace/worker:sim")
OURS = IMAGES[2:]

PLANE_FILES = {"CA": "ca.pem", "CERT": "plane.pem", "KEY": "plane.key"}

pytestmark = pytest.mark.usefixtures("images")


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_says_what_it_is(image):
    labels = inspected(image)["Config"]["Labels"]
    title, version, revision, licenses = (
        labels[f"org.opencontainers.image.{name}"] for name in ("title", "version", "revision", "licenses")
    )
    assert "Headrace" in title
    assert version == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert revision == run("git", "rev-parse", "--short", "HEAD").stdout.strip()
    assert licenses == "Apache-2.0"


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_runs_as_nobody_in_particular_and_can_be_asked_how_it_is(image):
    config = inspected(image)["Config"]
    assert docker("run", "--rm", "--entrypoint=id", image, "-u") == "1000"
    assert config["User"] == "headrace"
    assert config["Healthcheck"]["Test"][0] != "NONE"


@pytest.mark.parametrize("image", IMAGES)
def test_what_built_an_image_is_not_in_it(image):
    look = (
        "command -v cc gcc g++ make; "
        "ls -d /opt/headrace/bin/pip* /installer /src /wheels /root/.cache/pip /var/lib/apt/lists/*_Packages; "
        "find / -xdev -name '*.whl' -not -path '*/ensurepip/_bundled/*'; true"
    )
    found = docker("run", "--rm", "--user=0", "--entrypoint=sh", image, "-c", f"({look}) 2>/dev/null")
    assert found == ""


@pytest.mark.parametrize("image", OURS)
def test_traces_and_nkeys_need_nothing_more(image):
    python = ("run", "--rm", "--entrypoint=python3", image, "-c")
    docker(*python, "import nkeys, opentelemetry.exporter.otlp.proto.http.trace_exporter, opentelemetry.sdk")


@pytest.mark.parametrize("image", OURS)
def test_an_image_has_no_servers_of_other_projects(image):
    look = "find / -xdev -type f -perm -u+x '(' -name etcd -o -name nats-server ')' 2>&-; true"
    found = docker("run", "--rm", "--entrypoint=sh", image, "-c", look)
    assert found == ""


def test_the_gateway_has_its_index_compiled():
    docker("run", "--rm", "--entrypoint=sh", "headrace/gateway", "-c", "ls /opt/headrace/lib/*/*/router/index/*.so")


@pytest.mark.parametrize("image", OURS)
def test_nothing_is_served_openly_unless_said_so(image):
    refused = run("docker", "run", "--rm", image)
    assert refused.returncode == 2
    assert "HEADRACE_INSECURE" in refused.stdout or "--insecure" in refused.stdout


def test_another_flavor_is_refused_with_those_that_there_are():
    refused = run("make", "docker", "FLAVOR=foo")
    assert refused.returncode != 0
    assert "FLAVOR=foo: it must be one of cpu, cuda, sim" in refused.stdout


def test_a_model_that_the_user_of_the_image_may_not_read_is_named_with_that_user(tmp_path):
    model = tmp_path / "secret"
    model.mkdir()
    (model / "tokenizer.json").write_text("{}")
    tmp_path.chmod(0o755)
    for unreadable in (model / "tokenizer.json", model):
        unreadable.chmod(0)
        options = ("--rm", f"-v={model}:/models/secret", "-e=HEADRACE_INSECURE=true")
        refused = run("docker", "run", *options, "headrace/worker:sim", "--model", "/models/secret")
        assert refused.returncode == 2
        assert "--model is '/models/secret': user 1000 may not read its tokenizer.json" in refused.stdout


def test_images_run_without_rights_of_any_kind_and_with_tls():
    with Fleet() as fleet:
        docker("volume", "create", fleet.name("certs"))
        certs = f"--volume={fleet.name('certs')}:/certs"
        docker("run", "--rm", "--user=0", certs, "headrace/gateway", "certs", "/certs", "--host", "gateway")
        docker("run", "--rm", "--user=0", "--entrypoint=chown", certs, "headrace/gateway", "-R", "12345", "/certs")
        fleet.start_planes()
        own = {f"HEADRACE_PLANE_{kind}": f"/certs/{file}" for kind, file in PLANE_FILES.items()}
        https = {"HEADRACE_TLS_CERT": "/certs/server.pem", "HEADRACE_TLS_KEY": "/certs/server.key"}
        fleet.start_gateway(options=(*LOCKED, certs), **own, **https)
        fleet.start_worker("both", options=(*LOCKED, certs), **own)
        for each in ("etcd", "nats", "gateway", "both-1"):
            fleet.wait_healthy(each)
            assert fleet.stop(each) == 0, fleet.log(each)
