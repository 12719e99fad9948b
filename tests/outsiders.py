"""Other people's programs, run to their end."""

import asyncio
import os
from collections.abc import Mapping
from pathlib import Path


class Unended(Exception):  # noqa: N818 - names what is wrong
    """A program has not come to a good end; says how."""


async def output_of(
    *argv: str, patience_s: float, environment: Mapping[str, str] = os.environ, cwd: Path | None = None
) -> bytes:
    """What a program prints on its standard output, in an environment that does not know of our code.

    Raises:  Unended with the end of what it printed on both, after `patience_s` or with a status other than 0.
    """
    process = await asyncio.create_subprocess_exec(
        *argv,
        cwd=cwd,
        env={name: value for name, value in environment.items() if name != "PYTHONPATH"},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(patience_s):
            said, complained = await process.communicate()
    except TimeoutError:
        raise Unended(f"it has not ended within {patience_s:g} s") from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        told = (said + complained)[-4000:].decode(errors="replace")
        raise Unended(f"it ended with status {process.returncode}:\n{told}")
    return said
