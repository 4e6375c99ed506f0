"""Which tasks of a plan are wanted, which are ready, and what is left: the machine's bookkeeping.

A task is *wanted* if the plan's last tasks need it and it is not committed: what only committed tasks need is
never run again. It is *dead* if it was given up, or needs a task that was. It is *ready* if it is wanted, not
dead, not taken, and all its inputs are committed.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Mapping

from pipeline.tasks import Task, TaskKind


class TaskGraph:
    """`tasks`: in topological order (inputs first). `committed`: ids of what is done."""

    def __init__(self, tasks: Mapping[str, Task], committed: Iterable[str]) -> None:
        self.tasks = dict(tasks)
        self.order = {task_id: position for position, task_id in enumerate(self.tasks)}
        self.dependants: dict[str, list[str]] = {task_id: [] for task_id in self.tasks}
        for task in self.tasks.values():
            for input_id in dict.fromkeys(task.inputs):
                self.dependants[input_id].append(task.id)
        self.chain_of = _chains(self.tasks)
        self._rank_s = ranks_s(self.tasks)
        self._by_rank = sorted(self.tasks, key=self._rank_s.__getitem__)
        self.done = {task_id for task_id in committed if task_id in self.tasks}
        self.killed: set[str] = set()
        self.taken: set[str] = set()
        self.rebuild()

    def rebuild(self) -> None:
        """Work everything out again from `done`, `killed` and `taken`."""
        self.wanted = self._wanted()
        self.dead: set[str] = set()
        for task_id in self.killed:
            self._mark_dead(task_id)
        self.left: Counter[TaskKind] = Counter(self.tasks[i].kind for i in self.wanted - self.dead)
        self._missing = {
            task_id: sum(input_id not in self.done for input_id in set(self.tasks[task_id].inputs))
            for task_id in self.wanted
        }
        self._heaps: dict[TaskKind, list[tuple[int, int, str]]] = {}
        self._ready: set[str] = set()
        self.ready_of: Counter[TaskKind] = Counter()
        self.work_s = sum(self.tasks[i].work for i in self.wanted - self.dead)
        self._segments_left = Counter(self.chain_of[i] for i in self.wanted - self.dead if i in self.chain_of)
        self._left_of_chain: dict[str, list[str]] = {}
        for task_id in reversed(self.chain_of):
            if task_id in self.wanted and task_id not in self.dead:
                self._left_of_chain.setdefault(self.chain_of[task_id], []).append(task_id)
        self._longest = list(self._by_rank)
        for task_id in sorted(self.wanted, key=self.order.__getitem__):
            self._offer(task_id)

    def _wanted(self) -> set[str]:
        ends = [task_id for task_id, users in self.dependants.items() if not users]
        wanted: set[str] = set()
        queue = [task_id for task_id in ends if task_id not in self.done]
        while queue:
            task_id = queue.pop()
            if task_id not in wanted:
                wanted.add(task_id)
                queue.extend(i for i in self.tasks[task_id].inputs if i not in self.done)
        return wanted

    def _offer(self, task_id: str) -> None:
        """Make the task ready if it is."""
        blocked = task_id in self.dead or task_id in self.taken or task_id in self._ready
        if blocked or task_id not in self.wanted or self._missing[task_id]:
            return
        task = self.tasks[task_id]
        self._ready.add(task_id)
        self.ready_of[task.kind] += 1
        heapq.heappush(self._heaps.setdefault(task.kind, []), (task.priority, self.order[task_id], task_id))

    def _unready(self, task_id: str) -> None:
        if task_id in self._ready:
            self._ready.discard(task_id)
            self.ready_of[self.tasks[task_id].kind] -= 1

    def _leave(self, task_id: str) -> None:
        """The task does not count as left any more."""
        task = self.tasks[task_id]
        self.left[task.kind] -= 1
        self.work_s -= task.work
        if task_id in self.chain_of:
            self._segments_left[self.chain_of[task_id]] -= 1

    def is_ready(self, task_id: str) -> bool:
        """Whether the task is ready."""
        return task_id in self._ready

    def chains_left(self) -> int:
        """Chains with segments left."""
        return sum(left > 0 for left in self._segments_left.values())

    def path_s(self) -> float:
        """Expected seconds of the longest chain of tasks left that wait for each other."""
        while self._longest and (self._longest[-1] not in self.wanted or self._longest[-1] in self.dead):
            self._longest.pop()
        return self._rank_s[self._longest[-1]] if self._longest else 0.0

    def ready(self, kind: TaskKind) -> bool:
        """Whether any task of this kind is ready."""
        heap = self._heaps.get(kind, [])
        while heap and heap[0][2] not in self._ready:
            heapq.heappop(heap)
        return bool(heap)

    def take(self, kind: TaskKind, eligible: Callable[[str], bool]) -> str | None:
        """The first ready and eligible task of a kind, by priority, then in the plan's order; it is taken."""
        if not self.ready_of[kind]:
            return None
        heap, passed = self._heaps[kind], list[tuple[int, int, str]]()
        found = None
        while heap and found is None:
            entry = heapq.heappop(heap)
            if entry[2] not in self._ready:
                continue
            if eligible(entry[2]):
                found = entry[2]
            else:
                passed.append(entry)
        for entry in passed:
            heapq.heappush(heap, entry)
        if found is not None:
            self._unready(found)
            self.taken.add(found)
        return found

    def give_back(self, task_id: str) -> None:
        """A taken task ended without a result and may be tried again."""
        self.taken.discard(task_id)
        if task_id in self.wanted:
            self._offer(task_id)

    def finish(self, task_id: str) -> None:
        """The task is committed."""
        self.taken.discard(task_id)
        self._unready(task_id)
        if task_id in self.done:
            return
        self.done.add(task_id)
        if task_id in self.wanted:
            self.wanted.discard(task_id)
            if task_id not in self.dead:
                self._leave(task_id)
        for user in self.dependants[task_id]:
            if user in self.wanted:
                self._missing[user] -= 1
                self._offer(user)

    def undo(self, task_ids: Iterable[str]) -> None:
        """These commits do not count any more."""
        self.done.difference_update(task_ids)
        self.rebuild()

    def kill(self, task_id: str) -> None:
        """The task was given up: it and all that needs it is dead."""
        self.killed.add(task_id)
        self.taken.discard(task_id)
        for dead_id in self._mark_dead(task_id):
            self._unready(dead_id)
            if dead_id in self.wanted:
                self._leave(dead_id)

    def _mark_dead(self, task_id: str) -> list[str]:
        """Add the task and what needs it to `dead`, except what is done already; those added."""
        queue, added = [task_id], list[str]()
        while queue:
            task_id = queue.pop()
            if task_id not in self.dead and task_id not in self.done:
                self.dead.add(task_id)
                added.append(task_id)
                queue.extend(self.dependants[task_id])
        return added

    def alive_left(self) -> int:
        """Tasks that are wanted and may still be done."""
        return sum(self.left.values())

    def live_chains(self, enough: int) -> int:
        """Chains whose next segment waits for nothing but texts, sources and its own chain; counted up to `enough`.

        A day of film has thousands of segments, and this is asked whenever a worker is free: segments that are over
        are dropped from the ends of `_left_of_chain` until all is worked out again.
        """
        live = 0
        for chain, left in list(self._left_of_chain.items()):
            if live >= enough:
                break
            while left and (left[-1] not in self.wanted or left[-1] in self.dead):
                left.pop()
            if not left:
                del self._left_of_chain[chain]
            elif not self._waits_for_segment(left[-1]):
                live += 1
        return live

    def _waits_for_segment(self, task_id: str) -> bool:
        queue, seen = [i for i in self.tasks[task_id].inputs if i not in self.done], set[str]()
        while queue:
            input_id = queue.pop()
            if self.tasks[input_id].kind not in ("text", "source"):
                return True
            if input_id not in seen:
                seen.add(input_id)
                queue.extend(i for i in self.tasks[input_id].inputs if i not in self.done)
        return False


def _chains(tasks: Mapping[str, Task]) -> dict[str, str]:
    """For each segment, in the plan's order, the first segment of its chain."""
    chain: dict[str, str] = {}
    for task in tasks.values():
        if task.kind == "segment":
            before = [chain[input_id] for input_id in task.inputs if input_id in chain]
            chain[task.id] = before[0] if before else task.id
    return chain


def ranks_s(tasks: Mapping[str, Task]) -> dict[str, float]:
    """For each task, inputs first, the expected seconds from its beginning to the end of all that waits for it."""
    after = dict.fromkeys(tasks, 0.0)
    for name in reversed(list(tasks)):
        after[name] += tasks[name].work
        for upstream in tasks[name].inputs:
            after[upstream] = max(after[upstream], after[name])
    return after
