// Tables that sort by a click on their head, and the list of events, of which only the rows in view exist.

const ROW = 21;
const LIST_HEADS = ["time s", "cpu", "guest", "handler", "event", "value", "device"];
const LIST_WIDTHS = ["9em", "4em", "7em", "7em", "19em", "22em", ""];

function cell(row, text, kind, title) {
  const td = row.insertCell();
  td.textContent = text;
  if (kind) td.className = kind;
  if (title) td.title = title;
  return td;
}

class SortedTable {
  // columns: {head, key (of a row, to sort by), fill(tr, row, all)}; pick(row): what a click on a row does.
  constructor(table, columns, sortBy, pick) {
    Object.assign(this, {table, columns, pick, sortBy, down: true, rows: []});
  }

  show(rows) {
    this.rows = rows;
    const {table, columns} = this;
    table.textContent = "";
    const head = table.createTHead().insertRow();
    columns.forEach((column, number) => {
      const th = document.createElement("th");
      th.textContent = column.head + (number === this.sortBy ? (this.down ? " ▾" : " ▴") : "");
      if (column.number) th.className = "number";
      th.onclick = () => {
        this.down = number === this.sortBy ? !this.down : Boolean(column.number);
        this.sortBy = number;
        this.show(this.rows);
      };
      head.append(th);
    });
    const {key} = columns[this.sortBy], sign = this.down ? -1 : 1;
    const sorted = [...rows].sort((a, b) => sign * (key(a) < key(b) ? -1 : key(a) > key(b) ? 1 : 0));
    const body = table.createTBody();
    for (const row of sorted) {
      const tr = body.insertRow();
      for (const column of columns) column.fill(tr, row, rows);
      tr.onclick = () => this.pick(row);
    }
    if (!rows.length) cell(body.insertRow(), "nothing", "empty").colSpan = columns.length;
  }
}

function shareCell(tr, part, whole) {
  const td = cell(tr, whole ? `${(100 * part / whole).toFixed(1)} %` : "", "share");
  const bar = document.createElement("b");
  bar.style.width = `${whole ? 100 * part / whole : 0}%`;
  td.append(bar);
}

function colourCell(tr, colour, text, title) {
  const td = cell(tr, "", "", title), mark = document.createElement("i");
  mark.style.background = colour;
  td.append(mark, ` ${text}`);
  return td;
}

function total(rows, name) {
  return rows.reduce((sum, row) => sum + row[name], 0);
}

// Sums of the subjects that pass, by device; what has none goes by its kind. Interruptions are kvmpy's own affair.
function byDevice(trace, passes) {
  const rows = new Map();
  trace.subjects.forEach((subject, number) => {
    const {group} = subject;
    if (!passes[number] || !subject.count || group === "irq" || group === "interrupted") return;
    if (!rows.has(group)) rows.set(group, {name: group, count: 0, duration: 0, longest: 0});
    const row = rows.get(group);
    row.count += subject.count;
    row.duration += subject.duration;
    row.longest = Math.max(row.longest, subject.longest);
  });
  return [...rows.values()];
}

// Sums of the subjects that pass, by place: reads and writes of one port or address in one row.
function byPlace(trace, passes) {
  const rows = new Map();
  trace.subjects.forEach((subject, number) => {
    if (!passes[number] || !subject.count) return;
    const place = subject.kind === "irq" ? `irq ${parseInt(subject.address)}`
      : subject.kind === "step" || subject.address === null ? subject.name : subject.address;
    const key = [subject.kind, place, subject.device].join(" ");
    if (!rows.has(key))
      rows.set(key, {
        kind: subject.kind, group: subject.group, place, device: subject.device || "", remark: subject.remark, order: parseInt(subject.address) || 0,
        reads: 0, writes: 0, count: 0, duration: 0, name: subject.name,
      });
    const row = rows.get(key);
    row.count += subject.count;
    row.duration += subject.duration;
    if (subject.direction === "write") row.writes += subject.count;
    else if (subject.direction === "read") row.reads += subject.count;
  });
  return [...rows.values()];
}

class EventList {
  constructor(trace, heads, box, tall, table, pick) {
    Object.assign(this, {trace, box, tall, table, pick});
    this.events = new Uint32Array(0);
    this.chosen = -1;
    LIST_HEADS.forEach((text, number) => {
      const th = heads.appendChild(document.createElement("div"));
      th.textContent = text;
      th.style.width = LIST_WIDTHS[number];
      if (number < 4) th.className = "number";
    });
    box.addEventListener("scroll", () => this.draw());
    addEventListener("resize", () => this.draw());
    box.addEventListener("keydown", event => {
      const step = {ArrowDown: 1, ArrowUp: -1}[event.key];
      if (!step || this.chosen < 0) return;
      event.preventDefault();
      const next = this.position(this.chosen) + step;
      if (next >= 0 && next < this.events.length) this.pick(this.events[next]);
    });
  }

  show(events) {
    this.events = events;
    this.tall.style.height = `${(events.length + 1) * ROW}px`;
    this.draw();
  }

  position(i) {
    let low = 0, high = this.events.length;
    while (low < high) {
      const middle = low + high >> 1;
      if (this.events[middle] < i) low = middle + 1; else high = middle;
    }
    return low;
  }

  choose(i) {
    this.chosen = i;
    const top = this.position(i) * ROW;
    if (top < this.box.scrollTop || top > this.box.scrollTop + this.box.clientHeight - 3 * ROW)
      this.box.scrollTop = top - this.box.clientHeight / 2;
    this.draw();
  }

  draw() {
    const {trace, table, events} = this, first = Math.max(Math.floor(this.box.scrollTop / ROW) - 5, 0);
    const last = Math.min(first + Math.ceil(this.box.clientHeight / ROW) + 12, events.length);
    table.textContent = "";
    table.style.top = `${first * ROW}px`;
    const widths = table.appendChild(document.createElement("colgroup"));
    for (const width of LIST_WIDTHS) widths.appendChild(document.createElement("col")).style.width = width;
    for (let at = first; at < last; at++) {
      const i = events[at], subject = trace.subjects[trace.subject[i]], tr = table.insertRow();
      if (i === this.chosen) tr.className = "chosen";
      cell(tr, (trace.time[i] / 1e9).toFixed(6), "number");
      cell(tr, trace.vcpu[i] < 0 ? "-" : `cpu${trace.vcpu[i]}`, "number");
      cell(tr, trace.guest[i] ? timeText(trace.guest[i]) : "", "number");
      cell(tr, trace.vcpu[i] < 0 ? "" : timeText(trace.duration[i]), "number");
      colourCell(tr, trace.colours[subject.group], subject.name, subject.name);
      cell(tr, trace.value[i], "", trace.value[i]);
      cell(tr, [subject.device, subject.remark && `(${subject.remark})`].filter(Boolean).join(" "), subject.device === "nobody" ? "nobody" : "");
      tr.onclick = () => this.pick(i);
    }
    if (!events.length) cell(table.insertRow(), "no event passes the filter", "empty");
  }
}
