"""Whole runs under the faults of the list below, F1 to F44.

What must hold after any one of them: the run goes on from its newest sound checkpoint, and its record (step, exact bits
of the loss, learning rate, gradient norm, digest of the batch) and final state equal those of a run that nobody
disturbed; or it stops with a documented exit code and says what is wrong and what to do. `runs.py` has the processes
and the comparison.

`pytest tests/faults` runs what needs neither root nor minutes, `pytest tests/faults -m slow_faults` the rest (as root:
it mounts disks), and `python -m tests.faults.soak` the kill soak: 50 of them.

| fault | where, if not in a test of its name here |
|---|---|
| F1 SIGKILL at random moments (slow) | test_kills, soak |
| F2 SIGKILL at each point of the loop and of a save | test_kills |
| F3 SIGTERM or SIGINT while compiling, stepping, evaluating, saving | test_kills; waiting for data: F27 |
| F4 a second signal, a closed terminal (SIGHUP) | test_kills; in native code: tests/test_signals.py |
| F5 the end right after a save, an error in the loop | test_kills |
| F6 a full disk (slow), F8 a read-only one (slow) | test_disks; an injected ENOSPC: F7 |
| F7 a limit on the size of files, F37 no memory in a save | test_steps |
| F9 truncated data, F10 flipped bits, F11 lost files | test_damage; 200 flips: tests/test_checkpoint_io.py |
| F12 what is no checkpoint, F13 half-deleted ones | test_damage |
| F14 two runs in one folder | test_kills |
| F15 wrong clocks | test_damage; the saves' own clock: tests/test_checkpoint.py::test_when_a_save_is_due |
| F16 a changed config, F17 changed or damaged data, F18 another number of devices | test_identity |
| F18 another number of processes (slow) | test_two_processes |
| F19 to F22 two processes, one of them killed, told to stop, hanging, failing (slow) | test_two_processes |
| F23 a step that is not finite, F24 a spike | test_steps |
| F25 a bad token id | test_identity |
| F26 failing data | test_steps |
| F27 data that hang | test_kills; the warning: tests/test_data.py |
| F28 a tracker that fails | test_steps; one that blocks, a server that is down: tests/test_external_trackers.py |
| F29 a failing evaluation, F30 a save beside an evaluation of the average | test_steps |
| F31 a torn log | test_damage |
| F32 a bad cache of compiled programs | test_steps |
| F33 stepping back, F34 resuming twice, at step 0, at the end | test_identity |
| F35 what is kept | test_kills; random sequences: tests/test_checkpoint.py::test_what_is_kept |
| F36 another version of the format | test_damage |
| F38 a renamed folder, F39 a copied one, F40 a moved project | test_moves; paths: tests/test_run_place.py |
| F41 a pipe that nobody reads, F42 and F43 Ctrl-C in each phase of a start | test_terminals; tests/test_streams.py |
| F44 no room, or no leave, for a corpus | test_disks |
"""
