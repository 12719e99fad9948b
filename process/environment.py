"""Which `HEADRACE_*` variables say something to a command, and which only look as if they did."""

import difflib
import os
import re
from collections.abc import Collection, Iterator, Mapping

import cyclopts
from cyclopts.argument import ArgumentCollection, Token
from cyclopts.config import Env

PREFIX = "HEADRACE_"
_OF_THE_MACHINE = frozenset({f"{PREFIX}CACHE"})
"""Variables that are no command's setting: `process/paths.py`."""

_OF_AN_OPERATOR = frozenset({f"{PREFIX}URL", f"{PREFIX}API_KEY"})
"""Which gateway the commands of a terminal ask, and with which key: whoever exports them may start a
gateway or a worker from the same shell."""

# Kubernetes tells every container about every service of its namespace: one called headrace gives HEADRACE_PORT=tcp://…
_SERVICE_LINK = re.compile(r"\w+_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)")
_SERVICE_URL = re.compile(r"(tcp|udp|sctp)://")


class Environment(Env):
    """Flags that the command line does not give, from variables of exactly their name.

    Only flags: what a command is to do is never taken from the environment (`show_env_var=False`).
    """

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        super().__init__(PREFIX, command=False)
        self._environ = environ

    def __call__(self, app: cyclopts.App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:  # noqa: ARG002
        """Give every argument that has no value yet its variable's."""
        for argument in arguments:
            variable = self._convert_argument(commands, argument)
            value = self._environ.get(variable)
            is_flag = not argument.children and argument.parameter.show_env_var is not False
            if value is not None and is_flag and not argument.tokens and not _is_service_link(variable, value):
                argument.append(Token(keyword=variable, value=value, source=self.source))


def variable(setting: str) -> str:
    return PREFIX + setting.upper()


def strangers(environ: Mapping[str, str], settings: Collection[str]) -> Iterator[str]:
    """For each `HEADRACE_*` variable that names none of the settings, its name and the nearest one that does."""
    known = {variable(setting) for setting in settings} | _OF_THE_MACHINE | _OF_AN_OPERATOR
    for name in sorted(environ):
        if name.startswith(PREFIX) and name not in known and not _is_service_link(name, environ[name]):
            nearest = difflib.get_close_matches(name.removeprefix(PREFIX), [each.upper() for each in settings], 1)
            yield f"{name} names no setting" + (f"; the nearest is {variable(nearest[0])}" if nearest else "")


def without_strangers(environ: Mapping[str, str], settings: Collection[str]) -> dict[str, str]:
    """The environment for a process with these settings: without variables that would only puzzle it."""
    known = {variable(setting) for setting in settings} | _OF_THE_MACHINE
    return {name: value for name, value in environ.items() if not name.startswith(PREFIX) or name in known}


def _is_service_link(name: str, value: str) -> bool:
    return _SERVICE_LINK.fullmatch(name) is not None or _SERVICE_URL.match(value) is not None
