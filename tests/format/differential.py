#!/usr/bin/env python3
"""Lets both readers verify what mutations make of the golden archives: differential.py VMFOLD [ROUNDS [SEED]]

They should agree on whether an archive is intact, damaged or refused, and on which images of which commits are lost. Half of the mutations are
sealed, as in check.py. What they do not agree on is printed, and kept in the folder for temporary files. It fails where vmfold says that an
archive is intact and Python does not. Of commits that contradict themselves, which no writer makes, each may restore what the other does not.
"""
import collections
import json
import pathlib
import random
import subprocess
import sys
import tempfile

import check


def with_vmfold(vmfold, path):
    """What `vmfold verify` makes of an archive: its verdict, and the lost images as (commit, path)."""
    done = subprocess.run([vmfold, "verify", "--json", str(path)], capture_output=True, timeout=120)
    text = done.stderr.decode("utf-8", "replace")
    if done.returncode == 1 and "cannot be used" in text:
        return "refused", set(), text
    if done.returncode == 2 and "is not an archive" in text:
        return "damaged", None, text
    verdict = {0: "intact", 4: "damaged"}.get(done.returncode)
    assert verdict, (done.returncode, text)
    said = json.loads(done.stdout) if done.stdout else None
    lost = {(one["commit"], one["path"]) for one in said["lost"]} if said else None
    return verdict, lost, text or json.dumps(said["damage"] if said else None)


def with_python(path):
    code, said, text = check.read(path, "--verify")
    verdict = {0: "intact", 3: "refused", 4: "damaged"}[code]
    commits = said["commits"] if said else []
    alive = [one for one in commits if not one["forgotten"]]
    whole = {(one["number"], image["path"]) for one in alive for image in one["images"] if image["intact"]}
    return verdict, whole, text or json.dumps(said["damage"] if said else None)


def main():
    vmfold, rounds = sys.argv[1], int((sys.argv + ["", "500"])[2] or 500)
    seed = int(sys.argv[3]) if len(sys.argv) > 3 else 1
    goldens = sorted((check.ROOT / "testdata").glob("archive-v1*.vmfold"))
    goldens = [path for path in goldens if "critical" not in path.name]
    random_, counts = random.Random(seed), collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        for number in range(rounds):
            source = random_.choice(goldens)
            data = source.read_bytes()
            data = check.sealed(random_, data) if number % 2 else check.change(random_, data)
            path = pathlib.Path(folder) / "a.vmfold"
            path.write_bytes(data)
            verdict, lost, said = with_vmfold(vmfold, path)
            python_verdict, python_whole, python_said = with_python(path)
            problem = None
            if verdict != python_verdict:
                problem = f"{verdict} and {python_verdict}"
            elif lost is not None and lost & python_whole and "that the INDEX says" not in said:
                # vmfold salvages more; where a commit contradicts itself in an INDEX, it restores less.
                problem = f"{sorted(lost & python_whole)[:3]} lost for vmfold alone"
            counts[problem if problem and " and " in problem else "images" if problem else verdict] += 1
            if problem:
                kept = pathlib.Path(tempfile.gettempdir()) / f"differs-{seed}-{number}.vmfold"
                kept.write_bytes(data)
                print(f"{source.name} round {number}: {problem}\n  {said.strip()[:300]}\n  {python_said.strip()[:300]}\n  {kept}")
    print(dict(counts))
    sys.exit(any(one.startswith("intact and ") for one in counts))


main()
