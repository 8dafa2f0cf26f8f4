"""gpt2/kv_cache.py: segments do not overlap, and all released memory can be allocated again."""

from hypothesis import given
from hypothesis import strategies as st

from batchgen.gpt2.config import GPT2Config
from batchgen.gpt2.kv_cache import LANES, KVArena
from batchgen.gpt2.weights import round_up

CONFIG = GPT2Config(n_vocab=10, n_ctx=64, n_embd=8, n_head=2, n_layer=2)
NUMBERS = 2 * CONFIG.n_layer * CONFIG.n_embd  # of a position


@given(st.lists(st.tuples(st.integers(1, 70), st.integers(0, 100)), max_size=60))
def test_segments_never_overlap_and_all_memory_is_released(steps):
    """Each step allocates a segment or releases a held one."""
    arena = KVArena(CONFIG, 300)
    held = []
    for size, which in steps:
        if held and which % 3 == 0:
            arena.release(held.pop(which % len(held)))
            continue
        segment = arena.allocate(size, start=0)
        if segment is None:
            taken = sum(s.size for s in held)
            assert max((room for _, room in arena.free), default=0) < round_up(size, LANES)
            assert taken + sum(room for _, room in arena.free) == arena.n_tokens
            continue
        assert segment.size == round_up(size, LANES)
        assert segment.base + segment.size * NUMBERS <= len(arena.memory)
        ranges = [range(s.base, s.base + s.size * NUMBERS) for s in (segment, *held)]
        assert all(ranges[0].stop <= other.start or other.stop <= ranges[0].start for other in ranges[1:])
        held.append(segment)
    for segment in held:
        arena.release(segment)
    assert arena.free == [(0, arena.n_tokens)]


def test_a_full_arena_returns_none():
    arena = KVArena(CONFIG, 32)
    assert arena.allocate(32, start=0) is not None
    assert arena.allocate(1, start=0) is None


def test_a_path_starts_at_the_first_position():
    arena = KVArena(CONFIG, 300)
    root = arena.allocate(64, start=0)
    leaf = arena.allocate(5, start=64, parent=root)
    assert leaf.path == (root, leaf)
