from dataclasses import dataclass
from typing import Annotated

import cyclopts
import pytest
from cyclopts import Parameter

from process.environment import Environment, strangers, without_strangers


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    port: Annotated[int, Parameter(help="")] = 8000
    log_json: Annotated[bool, Parameter(help="")] = False
    etcd: Annotated[str, Parameter(help="")] = "here"


def read(environ, *argv):
    app = cyclopts.App(name="mill", config=Environment(environ), version_flags=[], result_action="return_value")
    seen = []

    @app.default
    def grind(
        *changes: Annotated[str, Parameter(name="changes", show_env_var=False)],
        settings: Annotated[Settings | None, Parameter(name="*")] = None,
    ) -> None:
        seen.append((changes, settings or Settings()))

    app(argv, exit_on_error=False, print_error=False)
    return seen[0]


def test_a_variable_sets_the_flag_of_its_name_and_the_flag_itself_counts_more():
    assert read({"HEADRACE_PORT": "1", "HEADRACE_LOG_JSON": "true"})[1] == Settings(port=1, log_json=True)
    assert read({"HEADRACE_PORT": "1"}, "--port", "2")[1] == Settings(port=2)


@pytest.mark.parametrize("value", ["", "http", "1 2"])
def test_a_value_that_is_none_stops_the_start(value):
    with pytest.raises(cyclopts.CoercionError, match="HEADRACE_PORT"):
        read({"HEADRACE_PORT": value})


def test_what_a_command_is_to_do_is_not_taken_from_the_environment():
    assert read({"HEADRACE_CHANGES": "policy=random"})[0] == ()
    assert read({"HEADRACE_SETTINGS": "x", "HEADRACE_": "x"}) == ((), Settings())


LINKS = {
    "HEADRACE_PORT": "tcp://10.0.0.1:8000",
    "HEADRACE_SERVICE_HOST": "10.0.0.1",
    "HEADRACE_SERVICE_PORT": "8000",
    "HEADRACE_SERVICE_PORT_HTTP": "8000",
    "HEADRACE_PORT_8000_TCP": "tcp://10.0.0.1:8000",
    "HEADRACE_PORT_8000_TCP_PROTO": "tcp",
    "HEADRACE_PORT_8000_TCP_PORT": "8000",
    "HEADRACE_PORT_8000_TCP_ADDR": "10.0.0.1",
    "HEADRACE_ETCD_SERVICE_HOST": "10.0.0.2",
    "HEADRACE_ETCD_PORT": "tcp://10.0.0.2:2379",
}


def test_what_kubernetes_tells_of_a_service_called_headrace_sets_nothing():
    assert read(LINKS)[1] == Settings()
    assert list(strangers(LINKS, ["port", "etcd"])) == []


def test_a_variable_that_names_no_setting_is_told_with_the_nearest_that_does():
    environ = {"HEADRACE_PROT": "1", "HEADRACE_LOG_JSON": "1", "HEADRACE_CACHE": "/c", "HEADRACE_XQ": "", "PORTT": "1"}
    assert list(strangers(environ, ["port", "log_json"])) == [
        "HEADRACE_PROT names no setting; the nearest is HEADRACE_PORT",
        "HEADRACE_XQ names no setting",
    ]


def test_what_an_operator_s_shell_asks_a_gateway_with_is_no_misspelt_setting_and_handed_to_nobody():
    environ = {"HEADRACE_URL": "http://gateway:8000", "HEADRACE_API_KEY": "secret"}
    assert list(strangers(environ, ["port", "api_keys"])) == []
    assert without_strangers(environ, ["port", "api_keys"]) == {}


def test_a_process_is_handed_only_what_it_reads():
    environ = {"HEADRACE_PORT": "1", "HEADRACE_ROLE": "both", "HEADRACE_CACHE": "/c", "PATH": "/bin"}
    assert without_strangers(environ, ["port"]) == {"HEADRACE_PORT": "1", "HEADRACE_CACHE": "/c", "PATH": "/bin"}
