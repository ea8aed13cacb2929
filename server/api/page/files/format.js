// Numbers as people read them.

const whole = new Intl.NumberFormat("en");
const three = new Intl.NumberFormat("en", { maximumSignificantDigits: 3 });
const UNITS = ["bytes", "KiB", "MiB", "GiB", "TiB"];

/** 12,345 */
export const count = (value) => whole.format(Math.round(value));

/** Three digits that count, 0.123 or 1.23 or 123. */
export const short = (value) => (value >= 1000 ? count(value) : three.format(value));

/** A share as percent: 12.3 %. */
export const percent = (share) => `${(100 * share).toFixed(share !== 0 && Math.abs(share) < 0.01 ? 2 : 1)} %`;

/** 1.5 GiB */
export function bytes(value) {
  let unit = 0;
  while (value >= 1024 && unit < UNITS.length - 1) {
    value /= 1024;
    unit += 1;
  }
  return `${three.format(value)} ${UNITS[unit]}`;
}

/** 0.12 s or 120 ms */
export const seconds = (value) => (value < 1 ? `${Math.round(1000 * value)} ms` : `${three.format(value)} s`);

/** With its sign: +12, −3. */
export const signed = (value, format) => `${value > 0 ? "+" : value < 0 ? "−" : ""}${format(Math.abs(value))}`;
