// The data of the page, and which of it the filter lets through.

// Groups, which are devices, or kinds of events that have none, take these in the order of how much they have to do.
const PALETTE = [
  "#2f6fde", "#e07b1a", "#2f9e57", "#b4489b", "#0f95a5", "#c9a400", "#7a5be0", "#c4473a", "#6d8f1f", "#3d6f8f", "#b0722f",
  "#d0679a",
];
const FIXED_COLOURS = {
  nobody: "#7c8594", interrupted: "#b3bac6", irq: "#0b7285", hlt: "#8a8f98", shutdown: "#d03030", others: "#9a8c7c",
};

function groupColours(subjects) {
  const counts = {};
  for (const subject of subjects) counts[subject.group] = (counts[subject.group] || 0) + subject.count;
  const colours = {...FIXED_COLOURS};
  let next = 0;
  for (const group of Object.keys(counts).sort((a, b) => counts[b] - counts[a]))
    if (!(group in colours)) colours[group] = PALETTE[next++ % PALETTE.length];
  return colours;
}

function makeTrace(data) {
  const first = data.first.time.length, size = first + data.last.time.length;
  const trace = {
    ...data, size, gap: data.count > size ? first : -1,
    time: new Float64Array(size), guest: new Float64Array(size), duration: new Float64Array(size),
    vcpu: new Int16Array(size), subject: new Uint32Array(size), value: new Array(size),
  };
  let at = 0;
  for (const part of [data.first, data.last]) {
    let time = 0;
    for (let i = 0; i < part.time.length; i++, at++) {
      time += part.time[i];
      trace.time[at] = time;
      trace.guest[at] = part.guest[i];
      trace.duration[at] = part.duration[i];
      trace.vcpu[at] = part.vcpu[i];
      trace.subject[at] = part.subject[i];
      trace.value[at] = part.value[i];
    }
  }
  data.first = data.last = null;
  for (const subject of trace.subjects) subject.group = subject.kind === "irq" ? "irq" : subject.device || subject.kind;
  trace.colours = groupColours(trace.subjects);
  for (const subject of trace.subjects)
    subject.words = [subject.kind, subject.name, subject.device || "", subject.remark].join(" ").toLowerCase();
  trace.vcpus = [...new Set(trace.vcpu)].filter(id => id >= 0).sort((a, b) => a - b);
  return trace;
}

// "uart out >10us cpu:1 -irq a|b": all words must match; a word with | matches by any of its parts.
function parseFilter(text) {
  const filter = {words: [], vcpu: null, least: 0};
  for (const word of text.toLowerCase().split(/\s+/).filter(Boolean)) {
    const cpu = /^cpu:(\d+)$/.exec(word), least = /^>(\d+(?:\.\d+)?)(ns|us|ms|s)?$/.exec(word);
    if (cpu) filter.vcpu = Number(cpu[1]);
    else if (least) filter.least = Number(least[1]) * {ns: 1, us: 1e3, ms: 1e6, s: 1e9}[least[2] || "us"];
    else if (word === "-") continue;
    else filter.words.push({not: word[0] === "-", any: word.replace(/^-/, "").split("|").filter(Boolean)});
  }
  return filter;
}

// Which subjects pass by their words and kind, and the numbers of the events that pass altogether.
function applyFilter(trace, filter, kinds) {
  const subjects = trace.subjects.map(subject => kinds.has(subject.kind) && filter.words.every(
    word => !word.any.length || word.any.some(part => subject.words.includes(part)) !== word.not));
  const events = new Uint32Array(trace.size);
  let count = 0;
  for (let i = 0; i < trace.size; i++)
    if (subjects[trace.subject[i]] && trace.duration[i] >= filter.least &&
        (filter.vcpu === null || trace.vcpu[i] === filter.vcpu)) events[count++] = i;
  return {subjects, events: events.subarray(0, count)};
}

function timeText(ns) {
  if (ns < 1e3) return `${Math.round(ns)} ns`;
  const [unit, name] = ns < 1e6 ? [1e3, "µs"] : ns < 1e9 ? [1e6, "ms"] : [1e9, "s"];
  const value = ns / unit;
  return `${value.toFixed(value < 10 ? 2 : value < 100 ? 1 : 0)} ${name}`;
}

function countText(number) {
  return number.toLocaleString("en-US");
}

function eventText(trace, i) {
  const subject = trace.subjects[trace.subject[i]];
  return [subject.name, trace.value[i] && `= ${trace.value[i]}`, subject.device, subject.remark && `(${subject.remark})`]
    .filter(Boolean).join(" ");
}
