"""How `pytest -n` spreads the tests: a file is for one worker, as its fixtures are, and the longest begin first."""

from typing import Any

from xdist.scheduler import LoadScopeScheduling

# Files that go to one worker, one after the other: those that start Ray, which would fail to start beside another of
# itself on two cores; and those that start groups of ranks, from one process that has imported torch.
TOGETHER = {
    "ray": ("launch/test_group.py", "launch/test_serve_ray.py", "launch/test_generate.py"),
    "ranks": ("test_ranks.py", "test_ranks_placement.py", "test_bench_ep.py", "routing/test_collectives.py"),
}
GROUPS = {file: group for group, files in TOGETHER.items() for file in files}
# By their seconds; those that are not named follow in the order of their names.
LONGEST = (
    "ray",
    "kernels/test_compile.py",
    "engine/test_loop.py",
    "kernels/test_delta_chunks.py",
    "kernels/test_sample.py",
    "kernels/test_sample_threshold.py",
    "ranks",
    "test_survey.py",
    "test_grammar_pool.py",
    "test_determinism.py",
    "test_grammar.py",
    "kernels/test_heads.py",
    "launch/test_cli_serve.py",
    "launch/test_http_client.py",
    "launch/test_http_responses.py",
    "launch/test_http_schema.py",
    "test_cli.py",
)


def group_of(nodeid: str) -> str:
    file = nodeid.split("::", 1)[0].removeprefix("tests/")
    return GROUPS.get(file, file)


def place_of(nodeid: str) -> int:
    group = group_of(nodeid)
    return LONGEST.index(group) if group in LONGEST else len(LONGEST)


class Spreading(LoadScopeScheduling):
    def __init__(self, config: Any, log: Any):
        config.option.loadscopereorder = False  # by number of tests
        super().__init__(config, log)

    def _split_scope(self, nodeid: str) -> str:
        return group_of(nodeid)
