"""What an encrypted sum costs: ours beside plaintext float32 and stock TenSEAL CKKS, on the same vectors.

    python benchmarks/secure_sum.py            about five minutes on two cores
    python benchmarks/secure_sum.py --quick    seconds; writes nothing

All systems run in one process and take turns, upload by upload, so that a busy machine slows all of them
alike. CPU seconds are the headline. An upload of ours is the real thing: quantised, packed, proven, masked,
encrypted and framed by every one of the n hospitals. CKKS reuses uploads where the note says so: what one
costs does not depend on n.
"""

from __future__ import annotations

import contextlib
import io
import sys
import time
from collections import defaultdict
from collections.abc import Iterator

import numpy as np
import tenseal
from _results import write
from rich.console import Console
from rich.table import Table

from fedmedgan.shared.secure_sum import cipher, masks, proof
from fedmedgan.shared.secure_sum.keys import generate_identity, new_epoch
from fedmedgan.shared.secure_sum.quantize import SlotPlan

CELLS = [(1_000_000, 5), (1_000_000, 10), (1_000_000, 20), (5_000_000, 5), (5_000_000, 20)]
"""(values of an update, hospitals)."""
QUICK_CELLS = [(50_000, 5)]
MAX_CKKS_UPLOADS = {1_000_000: 20, 5_000_000: 5}
"""How many distinct uploads CKKS makes; further hospitals send one of them again."""
SIGMA, UPDATE_RANGE = 0.02, 0.12
"""Updates are normal with this deviation; six of them are the range."""
DECRYPTIONS = 3

CLIENT = ("quantise", "seal", "encrypt")
SERVER = ("add", "serialise")
BACK = ("decrypt", "check")


class Timer:
    """CPU and wall seconds of each stage, one entry a call."""

    def __init__(self) -> None:
        self.cpu: dict[str, list[float]] = defaultdict(list)
        self.wall: dict[str, list[float]] = defaultdict(list)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        self.cpu[name].append(time.process_time() - cpu)
        self.wall[name].append(time.perf_counter() - wall)


class Ours:
    """One study with n hospitals of weight 1, as in client/cycle.py and server/aggregation.py."""

    def __init__(self, n_values: int, n_sites: int, bits: int) -> None:
        self.name, self.bits, self.n_sites, self.time = f"fedmedgan {bits} bit", bits, n_sites, Timer()
        self.plan = SlotPlan(n_values, bits, UPDATE_RANGE, n_sites)
        self.n_slots = self.plan.n_slots + proof.extra_slots(n_sites)
        self.n_blobs = cipher.blobs_for(self.n_slots)
        self.sites = [generate_identity() for _ in range(n_sites)]
        epoch = new_epoch(1, tuple(f"site-{i}" for i in range(n_sites)))
        key_id = epoch.key_id
        self.binding = {"study_hash": "00" * 32, "round": 1, "attempt": 1, "key_id": key_id}
        self.mac_key = proof.derive_mac_key(epoch.mac_root, "00" * 32, key_id, 1, 1)
        self.hospital = cipher.HospitalCipher(epoch.he_secret)
        self.server = cipher.AddOnly(self.n_blobs)
        self.reference = np.zeros(n_values, dtype=np.int64)
        self.saturated = self.up = self.mismatches = 0

    def upload(self, site: int, update: np.ndarray) -> None:
        with self.time.stage("quantise"):
            quantized = self.plan.quantize(update, np.random.default_rng())
        self.reference += quantized.levels
        self.saturated += quantized.saturated
        with self.time.stage("seal"):
            packed = self.plan.pack(quantized.levels, 1)
            sealed = proof.seal(packed, n_sites=self.n_sites, site_index=site, weight=1, mac_key=self.mac_key)
            others = {j: s.exchange_public for j, s in enumerate(self.sites) if j != site}
            masked = masks.mask(
                sealed,
                site_index=site,
                cohort=tuple(range(self.n_sites)),
                shared_secrets={j: self.sites[site].shared_secret(p) for j, p in others.items()},
                context=b"round 1, attempt 1",
            )
        with self.time.stage("encrypt"):
            message = cipher.frame(self.hospital.encrypt(masked), kind="update", **self.binding)
        self.up = len(message)
        with self.time.stage("add"):
            self.server.add(cipher.unframe(message, kind="update", n_blobs=self.n_blobs, **self.binding))

    def back(self) -> np.ndarray:
        with self.time.stage("serialise"):
            message = cipher.frame(self.server.result(), kind="sum", **self.binding)
        self.down = len(message)
        for _ in range(DECRYPTIONS):
            with self.time.stage("decrypt"):
                blobs = cipher.unframe(message, kind="sum", n_blobs=self.n_blobs, **self.binding)
                total = self.hospital.decrypt(blobs, self.n_slots)
            with self.time.stage("check"):
                everybody = dict.fromkeys(range(self.n_sites), 1)
                data = proof.open_sum(total, n_sites=self.n_sites, weights=everybody, mac_key=self.mac_key)
                sums = self.plan.unpack(data, self.n_sites)
                mean = self.plan.mean(sums, self.n_sites)
        self.mismatches = int(np.count_nonzero(sums != self.reference))
        return mean


class Ckks:
    """TenSEAL's CKKS as its users have it: 8192, [60, 40, 40], scale 2^40, one vector an update."""

    bits = None

    def __init__(self, n_sites: int, kind: str, max_uploads: int) -> None:
        self.name, self.n_sites, self.time = f"TenSEAL CKKS, {kind}", n_sites, Timer()
        encryption = {
            "symmetric": tenseal.ENCRYPTION_TYPE.SYMMETRIC,
            "public key": tenseal.ENCRYPTION_TYPE.ASYMMETRIC,
        }[kind]
        self.context = tenseal.context(
            tenseal.SCHEME_TYPE.CKKS,
            8192,
            coeff_mod_bit_sizes=[60, 40, 40],
            encryption_type=encryption,
        )
        self.context.global_scale = 2**40
        self.public = tenseal.context_from(self.context.serialize(save_secret_key=False))
        self.total = None
        self.uploads: list[bytes] = []
        self.max_uploads = max_uploads

    def upload(self, site: int, update: np.ndarray) -> None:
        if len(self.uploads) < self.max_uploads:
            with self.time.stage("encrypt"), contextlib.redirect_stdout(io.StringIO()):  # it prints a warning
                self.uploads.append(tenseal.ckks_vector(self.context, update).serialize())
        message = self.uploads[site % self.max_uploads]
        self.up = len(message)
        with self.time.stage("add"):
            vector = tenseal.ckks_vector_from(self.public, message)
            if self.total is None:
                self.total = vector
            else:
                self.total += vector

    def back(self) -> np.ndarray:
        with self.time.stage("serialise"):
            message = self.total.serialize()
        self.down = len(message)
        for _ in range(DECRYPTIONS):
            with self.time.stage("decrypt"):
                values = tenseal.ckks_vector_from(self.context, message).decrypt()
            with self.time.stage("check"):
                mean = (np.array(values) / self.n_sites).astype(np.float32)
        return mean


class Plain:
    """No protection: float32 bytes to the server, which adds."""

    name, bits = "plaintext float32", None

    def __init__(self, n_sites: int) -> None:
        self.n_sites, self.time, self.total = n_sites, Timer(), None

    def upload(self, site: int, update: np.ndarray) -> None:
        with self.time.stage("encrypt"):
            message = update.tobytes()
        self.up = len(message)
        with self.time.stage("add"):
            vector = np.frombuffer(message, dtype=np.float32)
            self.total = vector.copy() if self.total is None else self.total + vector

    def back(self) -> np.ndarray:
        with self.time.stage("serialise"):
            message = self.total.tobytes()
        self.down = len(message)
        for _ in range(DECRYPTIONS):
            with self.time.stage("check"):
                mean = np.frombuffer(message, dtype=np.float32) / np.float32(self.n_sites)
        return mean


def measure(n_values: int, n_sites: int) -> list[dict]:
    """One row a system. All get the same updates, and are compared with the mean of those."""
    max_uploads = min(n_sites, MAX_CKKS_UPLOADS.get(n_values, n_sites))
    systems = [
        Plain(n_sites),
        Ours(n_values, n_sites, 8),
        Ours(n_values, n_sites, 16),
        Ckks(n_sites, "symmetric", max_uploads),
    ]
    if n_values * n_sites <= 5_000_000:
        systems.append(Ckks(n_sites, "public key", max_uploads))
    true = np.zeros(n_values)
    for site in range(n_sites):
        rng = np.random.default_rng([n_values, site % max_uploads])
        update = rng.standard_normal(n_values, dtype=np.float32) * np.float32(SIGMA)
        true += update
        for system in systems:
            system.upload(site, update)
    true /= n_sites
    return [_row(system, n_values, n_sites, max_uploads, system.back() - true) for system in systems]


def _row(system, n_values: int, n_sites: int, max_uploads: int, error: np.ndarray) -> dict:
    cpu, wall = system.time.cpu, system.time.wall
    each = {name: float(np.median(cpu[name])) if name in cpu else 0.0 for name in CLIENT + BACK}
    server = {name: float(sum(cpu[name])) for name in SERVER}
    row = {
        "system": system.name,
        "bits": system.bits,
        "parameters": n_values,
        "sites": n_sites,
        "distinct_uploads": max_uploads if isinstance(system, Ckks) else n_sites,
        "cpu_s_per_hospital": {n: each[n] for n in CLIENT + BACK},
        "cpu_s_server": server,
        "wall_s_per_hospital": {n: float(np.median(wall[n])) if n in wall else 0.0 for n in CLIENT + BACK},
        "wall_s_server": {n: float(sum(wall[n])) for n in SERVER},
        "cpu_s_round": n_sites * sum(each.values()) + sum(server.values()),
        "up_bytes_per_param": system.up / n_values,
        "down_bytes_per_param": system.down / n_values,
        "max_error": float(np.abs(error).max()),
        "rms_error": float(np.sqrt(np.mean(error**2))),
    }
    if isinstance(system, Ours):
        row |= {
            "values_per_slot": system.plan.per_slot,
            "saturated": system.saturated,
            "mismatches": system.mismatches,
        }
    return row


def figures(rows: list[dict]) -> dict:
    """The numbers that pages quote."""

    def row(system: str, parameters: int, sites: int) -> dict:
        wanted = (system, parameters, sites)
        return next(r for r in rows if (r["system"], r["parameters"], r["sites"]) == wanted)

    eight, sixteen, ckks = "fedmedgan 8 bit", "fedmedgan 16 bit", "TenSEAL CKKS, symmetric"
    base = row(ckks, 1_000_000, 5)["cpu_s_round"]
    public = row("TenSEAL CKKS, public key", 1_000_000, 5)["cpu_s_round"]
    of_8, of_16 = (row(name, 1_000_000, 5)["cpu_s_round"] for name in (eight, sixteen))
    return {
        "uplink_8bit_bytes_per_param": row(eight, 1_000_000, 10)["up_bytes_per_param"],
        "uplink_16bit_bytes_per_param": row(sixteen, 1_000_000, 10)["up_bytes_per_param"],
        "downlink_8bit_bytes_per_param": row(eight, 1_000_000, 10)["down_bytes_per_param"],
        "downlink_16bit_bytes_per_param": row(sixteen, 1_000_000, 10)["down_bytes_per_param"],
        "encrypt_cpu_s_1M_8bit": row(eight, 1_000_000, 10)["cpu_s_per_hospital"]["encrypt"],
        "server_cpu_s_20x5M": sum(row(eight, 5_000_000, 20)["cpu_s_server"].values()),
        "server_cpu_s_20x5M_16bit": sum(row(sixteen, 5_000_000, 20)["cpu_s_server"].values()),
        "ckks_over_ours_cpu_8bit": base / of_8,
        "ckks_over_ours_cpu_16bit": base / of_16,
        "ckks_public_key_over_ours_cpu_8bit": public / of_8,
        "ckks_public_key_over_ours_cpu_16bit": public / of_16,
        "ckks_over_ours_uplink_8bit": row(ckks, 1_000_000, 10)["up_bytes_per_param"]
        / row(eight, 1_000_000, 10)["up_bytes_per_param"],
        "ckks_over_ours_cpu_8bit_20x5M": row(ckks, 5_000_000, 20)["cpu_s_round"]
        / row(eight, 5_000_000, 20)["cpu_s_round"],
        "mismatches": sum(r.get("mismatches", 0) for r in rows),
    }


NOTES = [
    "CPU seconds are the headline. cpu_s_round = hospitals x (their stages, medians) + the server's, summed.",
    "Uplink and downlink figures: 1M parameters, 10 hospitals of weight 1, frame and proof included.",
    "Ratios of CPU: a round of 1M parameters and 5 hospitals. Masks, proof and checks are in ours only.",
    "CKKS: 8192, [60, 40, 40], scale 2^40. Symmetric is what NVFlare uses; public key is TenSEAL's default.",
    "CKKS at 5M parameters and 20 hospitals: 5 distinct uploads, each added 4 times. Ours: 20 distinct ones.",
    "8 bits are lossy; 16 bits are the row to compare with CKKS and float32. Errors are of the mean.",
]


def show(rows: list[dict]) -> None:
    """The same as a table."""
    table = Table(title="CPU seconds: of one hospital, of the server in total, of the whole round")
    columns = (
        "system",
        "params",
        "sites",
        *CLIENT,
        *SERVER,
        *BACK,
        "round",
        "up B/p",
        "down B/p",
        "rms",
        "max",
    )
    for name in columns:
        table.add_column(name, justify="left" if name == "system" else "right", no_wrap=True)
    for r in rows:
        each, server = r["cpu_s_per_hospital"], r["cpu_s_server"]
        numbers = [each[n] for n in CLIENT] + [server[n] for n in SERVER] + [each[n] for n in BACK]
        table.add_row(
            r["system"],
            f"{r['parameters'] / 1e6:g}M",
            str(r["sites"]),
            *(f"{x:.3f}" for x in [*numbers, r["cpu_s_round"]]),
            f"{r['up_bytes_per_param']:.2f}",
            f"{r['down_bytes_per_param']:.2f}",
            f"{r['rms_error']:.1e}",
            f"{r['max_error']:.1e}",
        )
    Console(width=170).print(table)


def main() -> None:
    quick = "--quick" in sys.argv[1:]
    rows = [row for cell in (QUICK_CELLS if quick else CELLS) for row in measure(*cell)]
    show(rows)
    if quick:
        return
    packages = ("fedmedgan", "numpy", "tenseal", "cryptography")
    command = "python benchmarks/secure_sum.py"
    found = figures(rows)
    path = write("secure-sum", command=command, packages=packages, rows=rows, figures=found, notes=NOTES)
    Console(width=170).print({**found, "written": f"{path.parent.name}/{path.name}"})


if __name__ == "__main__":
    main()
