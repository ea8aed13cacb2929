from expert_store.residency.policy import LFU, LRU, KeepSome


def never(expert: int) -> bool:
    return False


def test_lru_evicts_the_least_recently_used() -> None:
    policy = LRU()
    for expert in (1, 2, 3):
        policy.admit(expert)
    policy.touch(1)
    assert [policy.evict(never) for _ in range(3)] == [2, 3, 1]


def test_lru_passes_over_leased_experts() -> None:
    policy = LRU()
    for expert in (1, 2, 3):
        policy.admit(expert)
    assert policy.evict({1, 2}.__contains__) == 3
    assert list(policy.resident()) == [1, 2]


def test_lfu_evicts_the_least_often_used_and_remembers_counts_after_eviction() -> None:
    policy = LFU()
    for expert in (1, 2, 3):
        policy.admit(expert)
    for expert in (1, 1, 2):
        policy.touch(expert)
    assert policy.evict(never) == 3
    assert policy.evict(never) == 2
    policy.admit(3)
    policy.admit(2)
    assert policy.evict(never) == 3, "2 was used more often in all, before and after it left"


def test_kept_experts_leave_only_when_every_other_is_leased() -> None:
    policy = KeepSome(LRU(), (1, 2))
    for expert in (1, 2, 3, 4):
        policy.admit(expert)
    assert list(policy.resident()) == [3, 4, 1, 2]
    assert policy.evict(never) == 3
    assert policy.evict({4}.__contains__) == 1
    policy.admit(5)
    assert [policy.evict(never) for _ in range(3)] == [4, 5, 2]
