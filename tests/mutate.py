"""Every promise's mechanism taken away, one at a time: `python -m tests.mutate [WORD ...]`.

In a copy of the tree a few words of code are replaced and the promise's test is run: it must fail. Exit code 1 if
one passes all the same, or if the words to replace are not there. WORD chooses by the row's name.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("pipeline", "cluster", "actors", "model", "kernels", "tests", "examples")
LIMIT_S = 600.0
"""Above the limit of a single test: one that hangs without its mechanism fails by that."""


@dataclass(frozen=True)
class Mutation:
    """`row`: what may go wrong. `file`: where `old` is replaced by `new`. `test`: what must fail then."""

    row: str
    file: str
    old: str
    new: str
    test: str


MUTATIONS = [
    Mutation("worker killed", "pipeline/machine.py",
             "            self._end_attempt(job, Fault(kind, event.reason))\n", "            pass\n",
             "test_machine.py::test_lost_nodes_and_interruptions_are_never_charged"),
    Mutation("killed before the commit", "pipeline/journal.py",
             "                self.deaths += 1\n", "                pass\n",
             "test_machine.py::test_a_task_that_kills_the_whole_render_again_and_again_is_given_up"),
    Mutation("killed after the commit", "pipeline/ledger.py",
             "                return standing\n", "                return record\n",
             "test_ledger.py::test_a_commit_happens_once_and_the_first_record_stands"),
    Mutation("node lost", "pipeline/machine.py",
             '"lost" if event.node_lost or ', '"lost" if ',
             "test_machine.py::test_within_the_deadline_a_lost_machine_may_cost_any_number_of_attempts"),
    Mutation("node lost, seen as a broken connection", "cluster/orchestrator.py",
             "    while isinstance(fate, ray_errors.ActorUnavailableError) and ", "    while False and ",
             "test_cluster_parts.py::test_a_worker_whose_connection_broke_is_asked_until_ray_knows_what_became_of_it"),
    Mutation("cluster gone", "pipeline/machine.py",
             "self._commits, self._state = dict(state.commits), state", "self._commits, self._state = {}, state",
             "test_machine.py::test_only_what_the_film_still_needs_is_run"),
    Mutation("preemption notice", "pipeline/crew.py",
             "if worker.node_id not in self._draining]", "if True]",
             "test_machine.py::test_nothing_new_is_sent_to_a_draining_node_and_nothing_there_is_charged"),
    Mutation("disk full", "pipeline/store.py",
             "FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)", "FULL: tuple[int, ...] = ()",
             "test_store.py::test_operating_system_errors_become_the_projects_own"),
    Mutation("store does not answer", "pipeline/ledger.py",
             "                if waited_s >= self._outage_s:\n", "                if True:\n",
             "test_ledger.py::test_outages_are_waited_out_and_told"),
    Mutation("store's answer lost", "pipeline/object_store.py",
             "return unanswered and self.read(path) == data", "return False",
             "test_store.py::test_a_record_created_by_a_request_nobody_answered_is_ours"),
    Mutation("bit flipped", "pipeline/store.py",
             "    if sha256 != artifact.sha256:\n", "    if False:\n",
             "test_store.py::test_open_local_gives_the_recorded_bytes_or_says_that_they_are_corrupt"),
    Mutation("artifact truncated", "pipeline/ledger.py",
             "            if found.size_bytes != file.size_bytes:\n", "            if False:\n",
             "test_ledger.py::test_short_and_missing_files_are_not_committed"),
    Mutation("record torn", "pipeline/records.py",
             '    if last_line != b"sha256 "', '    if False and last_line != b"sha256 "',
             "test_ledger.py::test_any_change_of_a_sealed_record_is_noticed"),
    Mutation("film damaged", "pipeline/ledger.py",
             "                del state.commits[task_id]\n", "                pass\n",
             "test_ledger.py::test_a_damaged_film_is_dropped_alone_and_for_good"),
    Mutation("found by verify", "cluster/show.py",
             "        ledger.apply_verification(found)\n", "        pass\n",
             "test_gc.py::test_what_verify_finds_is_rendered_again_with_all_that_came_of_it"),
    Mutation("clock jumps", "pipeline/machine.py",
             "MAX_GAP_S = 30.0", "MAX_GAP_S = 1e9",
             "test_machine.py::test_a_clock_that_jumps_causes_no_timeout"),
    Mutation("submitted twice", "pipeline/lease.py",
             "    if live:\n", "    if False:\n",
             "test_ledger.py::test_a_live_process_on_this_host_is_not_taken_over"),
    Mutation("two drivers", "pipeline/ledger.py",
             'if self._patiently(lambda: self.store.head(lease_path(self.epoch + 1))) is not None:', "if False:",
             "test_ledger.py::test_who_was_taken_over_can_neither_journal_nor_commit_nor_beat"),
    Mutation("zombie's late answer", "pipeline/ledger.py",
             "        if latest != (record.attempt, record.epoch):\n", "        if False:\n",
             "test_ledger.py::test_a_late_attempt_is_refused"),
    Mutation("ffmpeg crashes", "pipeline/media_child.py",
             "{self.last_words() or '(it said nothing)'}", "{''}",
             "test_media.py::test_what_ffmpeg_said_last_is_in_the_error"),
    Mutation("ffmpeg hangs", "pipeline/media_child.py",
             "            os.killpg(self._process.pid, signal.SIGKILL)\n", "            self._process.kill()\n",
             "test_media.py::test_a_hanging_ffmpeg_is_killed_with_its_children"),
    Mutation("ffmpeg writes a short file", "pipeline/media_film.py",
             "        check_timing(bench, name, frames, fps, ffmpeg, limit_s=_JOIN_LIMIT_S)\n", "        pass\n",
             "test_media.py::test_a_unit_that_lost_frames_stops_the_film"),
    Mutation("no progress", "pipeline/machine.py",
             "            if silent_s > limit_s:\n", "            if False:\n",
             "test_machine.py::test_a_worker_without_progress_is_recycled_and_its_task_moved"),
    Mutation("node that fails", "pipeline/crew.py",
             "if self._failures[worker.node_id] < self._patience]", "if True]",
             "test_machine.py::test_a_node_that_fails_three_times_in_a_row_is_avoided_as_long_as_there_are_others"),
    Mutation("NaN", "model/sampling.py",
             "    if not bool(torch.isfinite(noisy).all()):\n", "    if False:\n",
             "test_sampling.py::test_nan_is_an_error"),
    Mutation("no picture", "actors/chain.py",
             "    gate.check(label)\n", "    pass\n",
             "test_actors.py::test_a_segment_that_shows_one_flat_colour_is_refused"),
    Mutation("hand-off by pixels", "actors/chain.py",
             "    if not latents:\n", "    if True:\n",
             "test_studies.py::test_the_renderer_hands_on_what_the_study_calls_latents"),
    Mutation("hand-off planned by pixels", "pipeline/plan_tasks.py",
             "        if part.is_source or before % temporal or last % temporal:\n", "        if True:\n",
             "test_actors.py::test_segments_hand_their_last_latents_forward_and_the_frame_before_them"),
    Mutation("CUDA out of memory", "pipeline/machine.py",
             'event.fault.kind in ("memory", "device")', 'event.fault.kind == "device"',
             "test_machine.py::test_a_worker_that_ran_out_of_memory_is_replaced_and_its_task_charged"),
    Mutation("CUDA error", "pipeline/machine.py",
             'event.fault.kind in ("memory", "device")', 'event.fault.kind == "memory"',
             "test_machine.py::test_a_worker_whose_gpu_failed_is_replaced_before_it_fails_at_everything_else"),
    Mutation("storyboard changed", "pipeline/tasks.py",
             '"params": params, "inputs": inputs}', '"inputs": inputs}',
             "test_redo.py::test_a_changed_prompt_redoes_exactly_its_dependants_and_says_why"),
    Mutation("checkpoint or code changed", "pipeline/tasks.py",
             '"recipe": RECIPE_VERSION, ', "",
             "test_redo.py::test_a_plan_for_what_older_code_rendered_says_that_it_is_all_to_do_and_why"),
    Mutation("SIGTERM", "actors/denoising.py",
             "late = stopping or time.monotonic()", "late = time.monotonic()",
             "test_actors.py::test_a_stopped_denoising_goes_on_from_its_saved_step_bit_for_bit"),
    Mutation("other libraries", "pipeline/ledger.py",
             "        if differences and not allow_mixed:\n", "        if False:\n",
             "test_ledger.py::test_numerics_are_pinned_once_and_differences_are_named"),
    Mutation("refused", "cluster/orchestrator.py",
             "        if self._store.head(RECIPE_FILE) is None:\n", "        if True:\n",
             "test_cluster_parts.py::test_a_render_that_is_refused_leaves_the_recipe_and_the_report_of_what_was_rendered"),
    Mutation("gc crashes", "cluster/collect.py",
             "        if garbage.orphans:\n", "        if False:\n",
             "test_gc.py::test_a_crash_at_any_deletion_leaves_nothing_that_counts_without_its_bytes"),
    Mutation("two farms", "cluster/farm_books.py",
             "                self._ledger.take_lease()\n", "                pass\n",
             "test_farm_books.py::test_a_second_farm_is_refused_at_once_and_takes_over_when_the_first_has_ended"),
    Mutation("farm taken over", "cluster/farm_books.py",
             "            self._on_lost()\n", "            pass\n",
             "test_farm_books.py::test_a_farm_whose_books_were_taken_over_ends_and_writes_nothing"),
    Mutation("pause outlives farm", "cluster/farm.py",
             "            if state is None or state.phase in (phase, \"done\") or", "            if True or",
             "test_farm_books.py::test_a_pause_is_written_before_what_runs_has_ended"),
    Mutation("books fail", "cluster/farm_books.py",
             "            self._problem = problem\n            await asyncio.sleep(AGAIN_S)\n", "            break\n",
             "test_farm_books.py::test_what_the_store_does_not_take_is_written_once_it_does"),
    Mutation("chain on spot", "pipeline/machine.py",
             "event.role, event.host, event.spot)", "event.role, event.host)",
             "test_machine.py::test_the_chain_is_done_where_no_machine_is_taken_away"),
]  # fmt: skip


def main(words: list[str]) -> int:
    """Run the mutations chosen; the exit code."""
    chosen = [one for one in MUTATIONS if not words or any(word in one.row for word in words)]
    if not chosen:
        print(f"{__doc__}\nRows: {', '.join(one.row for one in MUTATIONS)}")
        return 2
    wrong = 0
    with TemporaryDirectory(prefix="mutate-") as name:
        copy = Path(name)
        for folder in FOLDERS:
            shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__", "renders"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        for mutation in chosen:
            verdict, seconds = try_out(mutation, copy)
            wrong += verdict != "fails"
            print(f"{mutation.row}: {mutation.test} {verdict} ({seconds:.0f} s)", flush=True)
    print(f"{wrong} wrong")
    return 1 if wrong else 0


def try_out(mutation: Mutation, copy: Path) -> tuple[str, float]:
    """What the test does without its mechanism, and how long it took."""
    began_s, path = time.monotonic(), copy / mutation.file
    whole = path.read_text()
    if whole.count(mutation.old) != 1:
        return f"NOT RUN: {mutation.old.strip()!r} is {whole.count(mutation.old)} times in {mutation.file}", 0.0
    path.write_text(whole.replace(mutation.old, mutation.new))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/{mutation.test}"]
    environment = os.environ | {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(
            command, cwd=copy, env=environment, capture_output=True, text=True, timeout=LIMIT_S, check=False
        )
        # Code 1: tests ran and failed; anything above means that they did not run.
        verdict = {0: "PASSES ALL THE SAME", 1: "fails"}.get(done.returncode, f"DID NOT RUN: {done.stdout[-300:]}")
    except subprocess.TimeoutExpired:
        verdict = f"DID NOT END within {LIMIT_S:.0f} s"
    finally:
        path.write_text(whole)
    return verdict, time.monotonic() - began_s


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
