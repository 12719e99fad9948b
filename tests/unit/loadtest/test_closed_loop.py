from itertools import islice

from loadtest.closed_loop import Shape, prompts

SHAPE = Shape(concurrency=2, prompt_bytes=300, max_tokens=1, shared_bytes=100)


def some(case="a case", run=0, client=0, shape=SHAPE):
    return list(islice(prompts(case, shape, run=run, client=client), 5))


def test_the_same_run_sends_the_same_prompts():
    assert some() == some()


def test_what_is_not_shared_is_new_in_every_prompt_client_and_run():
    found = [prompt[100:] for run in (-1, 0, 1) for client in (0, 1) for prompt in some(run=run, client=client)]
    assert len(set(found)) == 30


def test_what_is_shared_is_the_same_in_all_runs_of_a_case_and_in_no_other_case():
    ours = {prompt[:100] for run in (0, 1) for client in (0, 1) for prompt in some(run=run, client=client)}
    others = {prompt[:100] for prompt in some("another case")}
    assert (len(ours), len(others), ours & others) == (1, 1, set())


def test_prompts_that_are_shared_whole_are_all_the_same():
    assert len(set(some(shape=Shape(2, 200, 1, shared_bytes=200), run=3))) == 1
