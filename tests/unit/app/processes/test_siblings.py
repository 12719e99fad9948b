import asyncio
import contextlib
import tempfile
from pathlib import Path

import msgspec
import pytest

from app.processes.siblings import AskHealth, AskRoute, Place, Siblings


@pytest.fixture
def folder():
    with tempfile.TemporaryDirectory() as name:  # shorter than pytest's: a socket's path has a limit
        yield Path(name)


@contextlib.asynccontextmanager
async def _answering(siblings, answer):
    """Once it does."""
    task = asyncio.create_task(siblings.run(answer))
    number = siblings.place.number
    asking = Siblings(Place(0, number, siblings.place.folder, b""))
    while (await asking.ask(AskHealth()))[number] is None:
        assert not task.done()
    yield
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_those_that_are_there_answer(folder):
    one, two = (Siblings(Place(number, 3, folder, b"")) for number in (1, 2))
    ask = AskRoute("r-1", tenant="acme")
    async with _answering(two, lambda asked: msgspec.json.encode([asked == ask])):
        assert await one.ask(ask) == {2: b"[true]", 3: None}


async def test_a_process_takes_the_place_of_one_that_died(folder):
    one, two = (Siblings(Place(number, 2, folder, b"")) for number in (1, 2))
    two.place.socket(2).touch()
    async with _answering(two, lambda _: b"well"):
        assert await one.ask(AskHealth()) == {2: b"well"}


async def test_what_is_no_question_is_not_answered(folder):
    two = Siblings(Place(2, 2, folder, b""))
    async with _answering(two, lambda _: b"told"):
        reader, writer = await asyncio.open_unix_connection(two.place.socket(2))
        writer.write(b"GET / HTTP/1.1\r\n")
        assert await reader.read() == b""
        writer.close()
