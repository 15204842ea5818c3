// Puts the page together.

function buildPage() {
  const began = performance.now(), find = id => document.getElementById(id);
  const trace = makeTrace(JSON.parse(find("data").textContent));
  const kinds = new Set(Object.keys(trace.kinds)), counts = {};
  for (const subject of trace.subjects) counts[subject.kind] = (counts[subject.kind] || 0) + subject.count;

  document.title = find("title").textContent = trace.title;
  const exits = trace.subjects.filter(subject => subject.kind !== "irq");
  const handlers = total(exits, "duration"), guest = total(exits, "guest"), processors = Math.max(trace.vcpus.length, 1);
  const share = part => `${timeText(part)} (${(100 * part / Math.max(trace.span * processors, 1)).toFixed(1)} %)`;
  for (const [name, value] of [
    ["duration", timeText(trace.span)], ["events", countText(trace.count)], ["processors", trace.vcpus.length],
    ["in the guest", share(guest)], ["in handlers", share(handlers)],
  ]) {
    const pair = document.createElement("div"), dt = document.createElement("dt"), dd = document.createElement("dd");
    dt.textContent = name;
    dd.textContent = value;
    pair.append(dt, dd);
    find("facts").append(pair);
  }

  const pick = i => { list.choose(i); timeline.mark(i); };
  const timeline = new Timeline(trace, find("timeline"), find("overview"), find("tip"), pick);
  const list = new EventList(trace, find("heads"), find("list"), find("tall"), find("events"), pick);
  const narrow = text => { find("filter").value = text; filter(); };
  const number = (head, key, show) => ({head, number: true, key, fill: (tr, row) => cell(tr, show(key(row)), "number")});

  const devices = new SortedTable(find("devices"), [
    {head: "device", key: row => row.name, fill: (tr, row) => colourCell(tr, trace.colours[row.name], row.name)},
    number("events", row => row.count, countText),
    number("time", row => row.duration, timeText),
    {head: "share", number: true, key: row => row.duration, fill: (tr, row, all) => shareCell(tr, row.duration, total(all, "duration"))},
    number("mean", row => row.duration / row.count, timeText),
    number("longest", row => row.longest, timeText),
  ], 2, row => narrow(row.name));
  const places = new SortedTable(find("places"), [
    {head: "place", key: row => [row.kind, String(row.order).padStart(24, "0"), row.place].join(" "), fill: (tr, row) => colourCell(tr, trace.colours[row.group], row.place, trace.kinds[row.kind])},
    {head: "who", key: row => row.device, fill: (tr, row) => {
      const who = row.remark ? `${row.device} (${row.remark})` : row.device;
      cell(tr, who, row.device === "nobody" ? "rest nobody" : "rest", who);
    }},
    number("reads", row => row.reads, value => value ? countText(value) : ""),
    number("writes", row => row.writes, value => value ? countText(value) : ""),
    number("events", row => row.count, countText),
    number("time", row => row.duration, value => value ? timeText(value) : ""),
  ], 4, row => narrow(row.name.split(" ").pop()));
  const slow = makeTrace({...trace, first: trace.slowest, last: {time: []}, count: 0});
  const slowest = new SortedTable(find("slowest"), [
    number("took", i => slow.duration[i], timeText),
    {head: "event", key: i => slow.subjects[slow.subject[i]].name, fill: (tr, i) => colourCell(tr, slow.colours[slow.subjects[slow.subject[i]].group], eventText(slow, i), eventText(slow, i)).classList.add("rest")},
    number("at", i => slow.time[i], value => `${(value / 1e9).toFixed(6)} s`),
    number("cpu", i => slow.vcpu[i], String),
  ], 0, i => {
    const same = trace.time.indexOf(slow.time[i]);
    if (same >= 0) pick(same);
    else timeline.show(slow.time[i] - 20 * slow.duration[i], slow.time[i] + 20 * slow.duration[i]);
  });

  function filter() {
    const wanted = parseFilter(find("filter").value), passed = applyFilter(trace, wanted, kinds);
    let passing = null;
    if (passed.events.length < trace.size) {
      passing = new Uint8Array(trace.size);
      for (const i of passed.events) passing[i] = 1;
    }
    timeline.filter(passing);
    list.show(passed.events);
    devices.show(byDevice(trace, passed.subjects));
    places.show(byPlace(trace, passed.subjects));
    slowest.show([...applyFilter(slow, wanted, kinds).events]);
    find("matching").textContent = passing ? `${countText(passed.events.length)} of ${countText(trace.size)} events` : "";
  }

  for (const kind of Object.keys(trace.kinds).filter(kind => counts[kind])) {
    const button = document.createElement("button"), small = document.createElement("small");
    small.textContent = countText(counts[kind]);
    button.append(kind, small);
    button.title = trace.kinds[kind];
    button.setAttribute("aria-pressed", "true");
    button.onclick = () => {
      if (!kinds.delete(kind)) kinds.add(kind);
      button.setAttribute("aria-pressed", String(kinds.has(kind)));
      filter();
    };
    find("kinds").append(button);
  }
  find("kept").textContent = trace.gap < 0 ? "" :
    `the first ${countText(trace.gap)} and the last ${countText(trace.size - trace.gap)} of ${countText(trace.count)}; the tables count all of them`;
  let soon = 0;
  find("filter").addEventListener("input", () => { clearTimeout(soon); soon = setTimeout(filter, 60); });
  filter();
  timeline.drawNow();
  document.body.dataset.built = (performance.now() - began).toFixed(0);
}

buildPage();
