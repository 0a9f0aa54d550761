// One request in the shapes that people keep: a YAML file, JSON, a command of slimtune, curl.

const FLAGS = ["name", "model", "dataset", "validation_dataset", "memory_cap", "sequence_length", "batch_size", "steps", "epochs"];

export function snippet(kind, body, options) {
  return { yaml: () => yaml(body), json: () => json(body), cli: () => command(body, options), curl: () => curl(body, options) }[kind]();
}

function json(body) {
  return JSON.stringify(body, null, 2);
}

function yaml(value, indent = "") {
  return Object.entries(value)
    .map(([name, inner]) => {
      const key = indent + (/^[A-Za-z_][A-Za-z0-9_]*$/.test(name) && !WORDS.test(name) ? name : JSON.stringify(name));
      const nested = inner !== null && typeof inner === "object" && !Array.isArray(inner) && Object.keys(inner).length;
      return nested ? `${key}:\n${yaml(inner, `${indent}  `)}` : `${key}: ${scalar(inner)}`;
    })
    .join("\n");
}

const WORDS = /^(y|n|yes|no|on|off|true|false|null)$/i;

/** Words that every reader of YAML has as texts stand alone; all else is in quotes. Numbers have a point before an exponent. */
function scalar(value) {
  if (Array.isArray(value)) return `[${value.map(scalar).join(", ")}]`;
  if (typeof value === "number") return number(value);
  if (typeof value !== "string") return JSON.stringify(value);
  return /^[A-Za-z][A-Za-z0-9_-]*$/.test(value) && !WORDS.test(value) ? value : JSON.stringify(value);
}

function number(value) {
  const text = String(value);
  return /^-?\d+e/.test(text) ? text.replace("e", ".0e") : text;
}

/** `slimtune submit` with its flags; what it has none for goes into --set. */
function command(body, { origin }) {
  const parts = ["slimtune submit"];
  for (const name of FLAGS) if (name in body) parts.push(`--${name.replaceAll("_", "-")} ${shell(String(body[name]))}`);
  for (const [name, value] of leaves(body)) if (!FLAGS.includes(name)) parts.push(`--set ${shell(`${name}=${scalar(value)}`)}`);
  if (origin !== "http://127.0.0.1:8000") parts.push(`--url ${shell(origin)}`);
  return parts.join(" \\\n  ");
}

function leaves(value, prefix = "") {
  return Object.entries(value).flatMap(([name, inner]) => {
    const nested = inner !== null && typeof inner === "object" && !Array.isArray(inner) && Object.keys(inner).length;
    const simple = !name.includes(".") && !name.includes("=");
    return nested && simple && Object.keys(inner).every((each) => !/[.=]/.test(each)) ? leaves(inner, `${prefix}${name}.`) : [[prefix + name, inner]];
  });
}

function curl(body, { origin, keys }) {
  const key = keys ? ` \\\n  -H "Authorization: Bearer $SLIMTUNE_API_KEY"` : "";
  return `curl -s ${shell(`${origin}/jobs`)}${key} \\\n  -H 'Content-Type: application/json' -d ${shell(json(body))}`;
}

function shell(text) {
  return /^[A-Za-z0-9_./:=@%+-]+$/.test(text) ? text : `'${text.replaceAll("'", `'\\''`)}'`;
}
