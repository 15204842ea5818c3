// The timeline: a lane for each vCPU, in which guest and exits take turns, and one for each interrupt line.

const LANE = 34, LINE_LANE = 18, LEFT = 74, AXIS = 20;

class Timeline {
  constructor(trace, canvas, overview, tip, choose) {
    Object.assign(this, {trace, canvas, overview, tip, choose});
    this.from = 0;
    this.to = Math.max(trace.span, 1);
    this.passing = null;
    this.chosen = -1;
    this.lanes = trace.vcpus.map(id => ({label: `vCPU ${id}`, height: LANE, events: this.sorted(i => trace.vcpu[i] === id)}));
    const lines = new Map();
    for (let i = 0; i < trace.size; i++) {
      const subject = trace.subjects[trace.subject[i]];
      if (subject.kind !== "irq") continue;
      const number = parseInt(subject.address);
      if (!lines.has(number)) lines.set(number, {label: `irq ${number}`, title: subject.device, height: LINE_LANE, events: [], line: true});
      lines.get(number).events.push(i);
    }
    for (const number of [...lines.keys()].sort((a, b) => a - b)) this.lanes.push(lines.get(number));
    canvas.addEventListener("wheel", event => this.wheel(event), {passive: false});
    canvas.addEventListener("pointerdown", event => this.press(event));
    canvas.addEventListener("pointermove", event => this.move(event));
    canvas.addEventListener("pointerup", event => this.release(event));
    canvas.addEventListener("pointerleave", () => { this.tip.hidden = true; });
    canvas.addEventListener("dblclick", () => this.show(0, trace.span));
    overview.addEventListener("pointerdown", event => this.jump(event));
    overview.addEventListener("pointermove", event => { if (event.buttons) this.jump(event); });
    addEventListener("resize", () => this.draw());
  }

  sorted(test) {
    const found = [];
    for (let i = 0; i < this.trace.size; i++) if (test(i)) found.push(i);
    return Uint32Array.from(found.sort((a, b) => this.trace.time[a] - this.trace.time[b]));
  }

  show(from, to) {
    const span = Math.max(this.trace.span, 1), width = Math.min(Math.max(to - from, 200), span);
    this.from = Math.min(Math.max(from, 0), span - width);
    this.to = this.from + width;
    this.canvas.dataset.view = `${Math.round(this.from)} to ${Math.round(this.to)} ns`;
    this.draw();
  }

  filter(passing) {
    this.passing = passing;
    this.draw();
  }

  mark(i) {
    const {trace} = this, begin = trace.time[i] - trace.guest[i], end = trace.time[i] + trace.duration[i];
    this.chosen = i;
    const width = this.to - this.from;
    if (end - begin > width || width > 400 * (end - begin + 1000)) this.show(begin - 10 * (end - begin + 500), end + 10 * (end - begin + 500));
    else if (begin < this.from || end > this.to) this.show((begin + end - width) / 2, (begin + end + width) / 2);
    else this.draw();
  }

  // Drawing

  draw() {
    if (this.waits) return;
    this.waits = true;
    requestAnimationFrame(() => { this.waits = false; this.drawNow(); });
  }

  drawNow() {
    const height = AXIS + this.lanes.reduce((sum, lane) => sum + lane.height + 4, 0);
    const {context, width} = prepare(this.canvas, height);
    this.style = getComputedStyle(document.body);
    this.width = width;
    this.drawAxis(context, width, height);
    let top = AXIS;
    for (const lane of this.lanes) {
      context.fillStyle = this.style.getPropertyValue("--soft");
      context.font = "12px system-ui, sans-serif";
      context.fillText(lane.label, 0, top + lane.height / 2 + 4);
      context.save();
      context.beginPath();
      context.rect(LEFT, top, width - LEFT, lane.height);
      context.clip();
      if (lane.line) this.drawLine(context, lane, top, width);
      else this.drawLane(context, lane, top, width);
      context.restore();
      lane.top = top;
      top += lane.height + 4;
    }
    this.drawOverview();
  }

  // Pixels to a nanosecond.
  get scale() {
    return (this.width - LEFT) / (this.to - this.from);
  }

  x(time) {
    return LEFT + (time - this.from) * this.scale;
  }

  drawAxis(context, width, height) {
    const aim = (this.to - this.from) / Math.max((width - LEFT) / 110, 1), power = 10 ** Math.floor(Math.log10(aim));
    const step = power * [1, 2, 5, 10].find(factor => factor * power >= aim);
    context.font = "11px system-ui, sans-serif";
    for (let tick = Math.ceil(this.from / step) * step; tick <= this.to; tick += step) {
      const x = Math.round(this.x(tick)) + .5;
      context.fillStyle = this.style.getPropertyValue("--line");
      context.fillRect(x - .5, AXIS - 6, 1, height);
      context.fillStyle = this.style.getPropertyValue("--soft");
      context.fillText(tickText(tick, step), x + 3, 11);
    }
    if (this.trace.gap >= 0) {
      const {trace} = this, begin = trace.gap ? trace.time[trace.gap - 1] : 0, x = this.x(begin);
      context.fillStyle = this.style.getPropertyValue("--line");
      const wide = Math.max(this.x(trace.time[trace.gap]) - x, 1);
      context.fillRect(x, AXIS, wide, height);
      label(context, "counted only", x, x + wide, AXIS + 14, this.style.getPropertyValue("--soft"));
    }
  }

  // Events in view: from the first that ends in it to the last that begins in it.
  visible(lane) {
    const {trace} = this, {events} = lane;
    let low = 0, high = events.length;
    while (low < high) {
      const middle = low + high >> 1;
      if (trace.time[events[middle]] + trace.duration[events[middle]] < this.from) low = middle + 1; else high = middle;
    }
    let end = low;
    high = events.length;
    while (end < high) {
      const middle = end + high >> 1;
      if (trace.time[events[middle]] - trace.guest[events[middle]] <= this.to) end = middle + 1; else high = middle;
    }
    return [low, end];
  }

  // What is narrower than two pixels is gathered: a column shows the shares of guest and handlers.
  drawLane(context, lane, top, width) {
    const {trace} = this, [low, end] = this.visible(lane);
    const guest = new Float64Array(Math.ceil(width) + 1), busy = new Float64Array(guest.length), faint = new Float64Array(guest.length);
    const colours = new Array(guest.length), longest = new Float64Array(guest.length);
    const guestColour = this.style.getPropertyValue("--guest");
    for (let at = low; at < end; at++) {
      const i = lane.events[at], subject = trace.subjects[trace.subject[i]];
      const begin = this.x(trace.time[i] - trace.guest[i]), middle = this.x(trace.time[i]), stop = this.x(trace.time[i] + trace.duration[i]);
      const colour = trace.colours[subject.group], passes = !this.passing || this.passing[i];
      if (stop - begin < 2) {
        const column = Math.min(Math.max(begin | 0, LEFT), width | 0);
        guest[column] += middle - begin;
        (passes ? busy : faint)[column] += stop - middle;
        if (passes && stop - middle >= longest[column]) { longest[column] = stop - middle; colours[column] = colour; }
        continue;
      }
      if (middle > begin) {
        context.fillStyle = guestColour;
        context.fillRect(begin, top, middle - begin, lane.height);
      }
      context.globalAlpha = passes ? 1 : .18;
      context.fillStyle = colour;
      context.fillRect(middle, top, Math.max(stop - middle, 1), lane.height);
      context.globalAlpha = 1;
      if (stop - middle > 46 && passes) label(context, eventText(trace, i), middle, stop, top + lane.height / 2 + 4, "#fff");
      if (middle - begin > 60) label(context, "guest", begin, middle, top + lane.height / 2 + 4, this.style.getPropertyValue("--soft"));
    }
    for (let column = LEFT; column < guest.length; column++) {
      const all = guest[column] + busy[column] + faint[column];
      if (!all) continue;
      context.fillStyle = guestColour;
      context.fillRect(column, top, 1, lane.height);
      const high = lane.height * busy[column] / all;
      context.fillStyle = colours[column] || "#888";
      context.fillRect(column, top + lane.height - Math.max(high, colours[column] ? 3 : 0), 1, lane.height);
    }
    if (this.chosen >= 0 && trace.vcpu[this.chosen] >= 0 && lane.label === `vCPU ${trace.vcpu[this.chosen]}`) {
      const x = this.x(trace.time[this.chosen]), wide = Math.max(trace.duration[this.chosen] * this.scale, 2);
      context.strokeStyle = this.style.getPropertyValue("--text");
      context.lineWidth = 2;
      context.strokeRect(x - 1, top + 1, wide + 2, lane.height - 2);
    }
  }

  drawLine(context, lane, top, width) {
    const {trace} = this;
    context.fillStyle = trace.colours.irq;
    let high = -1;
    const bar = (from, to) => context.fillRect(from, top + 2, Math.max(to - from, 1), lane.height - 4);
    context.fillRect(LEFT, top + lane.height - 2, width, 1);
    for (const i of lane.events) {
      const raised = trace.subjects[trace.subject[i]].direction === "raise";
      if (raised && high < 0) high = trace.time[i];
      else if (!raised && high >= 0) { bar(this.x(high), this.x(trace.time[i])); high = -1; }
    }
    if (high >= 0) bar(this.x(high), width);
  }

  drawOverview() {
    const {context, width} = prepare(this.overview, 46), {overview, span, colours} = this.trace;
    const names = Object.keys(overview.counts), columns = Math.max(Math.ceil(span / overview.width), 1);
    let most = 1;
    for (let column = 0; column < columns; column++)
      most = Math.max(most, names.reduce((sum, group) => sum + overview.counts[group][column], 0));
    const wide = (width - LEFT) * overview.width / Math.max(span, 1);
    for (let column = 0; column < columns; column++) {
      let base = 44;
      for (const group of names) {
        const high = overview.counts[group][column] / most * 40;
        context.fillStyle = colours[group] || colours.others;
        context.fillRect(LEFT + column * wide, base - high, Math.max(wide - (wide > 4 ? 1 : 0), 1), high);
        base -= high;
      }
    }
    context.fillStyle = this.style.getPropertyValue("--soft");
    context.font = "11px system-ui, sans-serif";
    context.fillText("all events", 0, 16);
    context.fillText(`max ${rate(most, overview.width)}`, 0, 30);
    const scale = (width - LEFT) / Math.max(span, 1), x = LEFT + this.from * scale, size = Math.max((this.to - this.from) * scale, 3);
    context.fillStyle = this.style.getPropertyValue("--accent");
    context.globalAlpha = .16;
    context.fillRect(x, 0, size, 46);
    context.globalAlpha = 1;
    context.strokeStyle = this.style.getPropertyValue("--accent");
    context.strokeRect(x + .5, .5, Math.max(size - 1, 1), 45);
  }

  // Mouse

  wheel(event) {
    event.preventDefault();
    const at = this.from + (event.offsetX - LEFT) / this.scale;
    if (Math.abs(event.deltaX) > Math.abs(event.deltaY)) {
      this.show(this.from + event.deltaX / this.scale, this.to + event.deltaX / this.scale);
      return;
    }
    const factor = 1.0018 ** event.deltaY;
    this.show(at - (at - this.from) * factor, at + (this.to - at) * factor);
  }

  press(event) {
    this.drag = {x: event.offsetX, from: this.from, moved: false};
    this.canvas.setPointerCapture(event.pointerId);
    this.canvas.classList.add("dragged");
  }

  move(event) {
    if (this.drag) {
      const by = (this.drag.x - event.offsetX) / this.scale;
      this.drag.moved ||= Math.abs(this.drag.x - event.offsetX) > 3;
      this.show(this.drag.from + by, this.drag.from + by + this.to - this.from);
    }
    const i = this.drag && this.drag.moved ? -1 : this.at(event.offsetX, event.offsetY);
    this.tip.hidden = i < 0;
    if (i < 0) return;
    const {trace} = this;
    const lines = [eventText(trace, i), `at ${(trace.time[i] / 1e6).toFixed(6)} ms`];
    if (trace.vcpu[i] >= 0) lines.push(`handler ${timeText(trace.duration[i])}, guest before it ${timeText(trace.guest[i])}`);
    this.tip.textContent = lines.join("\n");
    this.tip.style.left = `${Math.min(event.clientX + 14, innerWidth - this.tip.offsetWidth - 8)}px`;
    this.tip.style.top = `${event.clientY + 16}px`;
  }

  release(event) {
    this.canvas.classList.remove("dragged");
    const {moved} = this.drag || {};
    this.drag = null;
    const i = moved ? -1 : this.at(event.offsetX, event.offsetY);
    if (i >= 0) this.choose(i);
  }

  // The event at a place, or the one nearest to it in its lane, within five pixels.
  at(x, y) {
    const lane = this.lanes.find(lane => y >= lane.top && y < lane.top + lane.height);
    if (!lane || x < LEFT) return -1;
    const {trace} = this, time = this.from + (x - LEFT) / this.scale;
    let best = -1, nearest = 5 / this.scale;
    const [low, end] = lane.line ? [0, lane.events.length] : this.visible(lane);
    for (let at = low; at < end; at++) {
      const i = lane.events[at], begin = trace.time[i] - trace.guest[i], stop = trace.time[i] + trace.duration[i];
      const away = time < begin ? begin - time : time > stop ? time - stop : 0;
      if (away <= nearest && !(this.passing && !this.passing[i])) { nearest = away; best = i; if (!away) break; }
    }
    return best;
  }

  jump(event) {
    const time = (event.offsetX - LEFT) / (this.overview.clientWidth - LEFT) * this.trace.span, half = (this.to - this.from) / 2;
    this.show(time - half, time + half);
  }
}

function prepare(canvas, height) {
  const ratio = devicePixelRatio || 1, width = canvas.clientWidth || 800;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  canvas.style.height = `${height}px`;
  const context = canvas.getContext("2d");
  context.scale(ratio, ratio);
  return {context, width};
}

function tickText(tick, step) {
  const [unit, name] = step >= 1e8 ? [1e9, "s"] : step >= 1e5 ? [1e6, "ms"] : [1e3, "µs"];
  const digits = Math.min(Math.max(0, -Math.floor(Math.log10(step / unit) + 1e-9)), 3);
  return tick ? `${(tick / unit).toFixed(digits)} ${name}` : "0";
}

function label(context, text, from, to, y, colour) {
  const begin = Math.max(from, LEFT) + 4, room = to - begin - 4;
  if (room < 20) return;
  context.font = "11px system-ui, sans-serif";
  const fits = Math.floor(room / 6);
  context.fillStyle = colour;
  context.fillText(text.length > fits ? `${text.slice(0, Math.max(fits - 1, 1))}…` : text, begin, y, room);
}

function rate(count, width) {
  const each = count / width * 1e6;
  return `${each >= 10 ? Math.round(each) : each.toFixed(1)}/ms`;
}
