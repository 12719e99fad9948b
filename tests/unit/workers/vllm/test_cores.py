from workers.vllm.cores import pin_threads


def test_a_thread_that_ends_meanwhile_keeps_no_other_from_its_cores(tmp_path):
    pinned = []

    def pin(thread, cores):
        if thread == 12:
            raise ProcessLookupError
        pinned.append((thread, cores))

    for thread in (11, 12, 13):
        (tmp_path / "7" / "task" / str(thread)).mkdir(parents=True)
    pin_threads(7, (2, 3), proc=tmp_path, pin=pin)
    assert sorted(pinned) == [(11, (2, 3)), (13, (2, 3))]
