#!/usr/bin/env python3
"""Lets both readers verify what mutations make of the golden archives: differential.py VMFOLD [ROUNDS [SEED]]
Or lets them verify given archives: differential.py VMFOLD --over ARCHIVE...

They must agree on whether an archive is intact: it fails where they do not. Half of the mutations are sealed, as in check.py. What else they do not
agree on is printed, and kept in the folder for temporary files: of an archive with damage and a record that is refused, each may say what it
meets first; of commits that contradict themselves, which no writer makes, each may restore what the other does not. Of given archives, readers
must agree on all of it.
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


def compare(vmfold, path):
    """Gives vmfold's verdict, what the readers do not agree on, if anything, and what each of them said."""
    verdict, lost, said = with_vmfold(vmfold, path)
    python_verdict, python_whole, python_said = with_python(path)
    problem = None
    if verdict != python_verdict:
        problem = f"{verdict} and {python_verdict}"
    elif lost is not None and lost & python_whole and "that the INDEX says" not in said:
        # vmfold salvages more; where a commit contradicts itself in an INDEX, it restores less.
        problem = f"{sorted(lost & python_whole)[:3]} lost for vmfold alone"
    return verdict, problem, f"  {said.strip()[:300]}\n  {python_said.strip()[:300]}"


def over(vmfold, paths):
    """Fails if the readers do not agree on an archive."""
    agree = True
    for number, path in enumerate(paths):
        verdict, problem, said = compare(vmfold, pathlib.Path(path))
        # The name may be no text: whoever reads this knows which archive has the number.
        print(f"{ascii(path)}: {problem}\n{ascii(said)}" if problem else f"{number}: {verdict}")
        agree &= problem is None
    sys.exit(not agree)


def main():
    if sys.argv[2:3] == ["--over"]:
        over(sys.argv[1], sys.argv[3:])
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
            verdict, problem, said = compare(vmfold, path)
            counts[problem if problem and " and " in problem else "images" if problem else verdict] += 1
            if problem:
                kept = pathlib.Path(tempfile.gettempdir()) / f"differs-{seed}-{number}.vmfold"
                kept.write_bytes(data)
                print(f"{source.name} round {number}: {problem}\n{said}\n  {kept}")
    print(dict(counts))
    sys.exit(any("intact" in one.split(" and ") for one in counts if " and " in one))


main()
