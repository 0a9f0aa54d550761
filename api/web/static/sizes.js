// Sizes as people type them, as api/units.py reads them.

const FACTORS = { "": 1, b: 1, kb: 1e3, mb: 1e6, gb: 1e9, tb: 1e12, kib: 2 ** 10, mib: 2 ** 20, gib: 2 ** 30, tib: 2 ** 40 };
export const MIB = 2 ** 20;

/** Bytes of `1.5GiB`; null for what is no size. */
export function parseBytes(text) {
  const match = /^([0-9]+(?:\.[0-9]+)?) ?([a-z]*)$/i.exec(text.trim());
  const factor = match && FACTORS[match[2].toLowerCase()];
  return factor ? Math.floor(Number(match[1]) * factor) : null;
}

/** Whole MiB, never less than what was asked for. */
export function capText(bytes) {
  return `${Math.max(1, Math.ceil(bytes / MIB))} MiB`;
}
