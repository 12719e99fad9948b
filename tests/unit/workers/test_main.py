import asyncio

import pytest

from workers.main import Ending


async def forever():
    await asyncio.Event().wait()


async def nothing():
    return None


async def trouble():
    raise ValueError("trouble")


async def test_work_that_ends_before_the_end_is_done():
    assert await Ending().outlasts(nothing())


async def test_the_end_cancels_the_work_it_interrupts():
    ending = Ending()
    ending.asked()
    assert not await ending.outlasts(forever())


async def test_what_the_work_raises_is_passed_on():
    with pytest.raises(ValueError, match="trouble"):
        await Ending().outlasts(trouble())


async def test_the_first_reason_for_the_end_counts():
    asked, died = Ending(), Ending()
    asked.asked()
    asked.engine_died("later")
    died.engine_died("first")
    died.asked()
    assert (asked.death, died.death) == (None, "first")
    await asked.wait()
