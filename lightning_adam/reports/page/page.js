"use strict";

const report = JSON.parse(document.getElementById("data").textContent);
const root = document.documentElement;
const isComparison = report.runs.length > 1;
const isTouched = matchMedia("(pointer: coarse)").matches;

// Okabe and Ito's colours, the darker ones lightened where the ground is dark.
const COLOURS = {
  light: ["#0072b2", "#d55e00", "#008060", "#a8407c", "#8a6d00", "#4a4fc4", "#5f6b76"],
  dark: ["#56b4e9", "#f0803c", "#2dbd94", "#e08cc0", "#e3c13b", "#a3a6ff", "#aab4be"],
};
// Shares grow out of the ground; of values none is nothing.
const SHARES = {
  light: [[0, "#dcebf8"], [0.5, "#4292c6"], [1, "#08306b"]],
  dark: [[0, "#17314c"], [0.5, "#4292c6"], [1, "#dcebf8"]],
};
const VALUES = "Viridis";
const SIGNED_VALUES = "RdBu";

// What is chosen on the page: the colours' ground, the steps, the hidden lines, the scope.
const chosen = { theme: "light", steps: null, hidden: new Set(), scope: null };

const ARRAYS = { float32: Float32Array, float64: Float64Array };
function unpacked(packed) {
  if (!packed.array) {
    const bytes = Uint8Array.from(atob(packed.bytes), (letter) => letter.charCodeAt(0));
    packed.array = new ARRAYS[packed.type](bytes.buffer);
    packed.bytes = null;
  }
  return packed.array;
}

/** Names may hold anything; Plotly reads tags in its texts. */
function asText(name) {
  return String(name).replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
}

const sorted = (numbers) => Array.from(numbers).sort((one, other) => one - other);
const powerOfTen = (exponent) => `1e${exponent}`;

// ---- What there is: scopes, lines, steps

function everyLine() {
  return Object.values(report.panels).flatMap((panel) =>
    panel.lines ?? (panel.choices ?? []).flatMap((choice) => choice.lines));
}
// What is not ours, such as the loss, has no scope.
const scopes = [...new Set(everyLine().map((line) => line.scope ?? []).flat())].sort(
  (one, other) => (other === "model") - (one === "model") || one.localeCompare(other));
chosen.scope = scopes[0] ?? "model";

/** The lines are told apart by their runs; those of one run by their scopes. */
const nameOf = (line) => (isComparison ? report.runs[line.run] : line.scope ?? report.runs[0]);
const names = isComparison ? report.runs : scopes;
const colourOf = (line) => {
  const colours = COLOURS[chosen.theme];
  const place = isComparison ? line.run : Math.max(scopes.indexOf(line.scope), 0);
  return colours[place % colours.length];
};
/** Where lines of one run lie upon each other all are seen: the later, the thinner. */
const widthOf = (line) =>
  isComparison ? 1.6 : [4, 2.6][scopes.indexOf(line.scope)] ?? 1.4;
const isShown = (line) =>
  !chosen.hidden.has(nameOf(line)) &&
  (!isComparison || line.scope === null || line.scope === chosen.scope);

const ends = [Infinity, -Infinity];
for (const panel of Object.values(report.panels)) {
  // The steps before an event stand by themselves.
  const maps = (panel.maps ?? []).filter((map) => map.event === undefined);
  for (const line of [...(panel.choices ?? []).flatMap((choice) => choice.lines), ...maps]) {
    const steps = unpacked(line.steps);
    if (steps.length) {
      ends[0] = Math.min(ends[0], steps[0]);
      ends[1] = Math.max(ends[1], steps[steps.length - 1]);
    }
  }
}

// ---- Drawing: each returns what Plotly needs, from what the panel holds and what is chosen

const style = (name) => getComputedStyle(root).getPropertyValue(name).trim();

function layoutOf(extra) {
  const axis = {
    gridcolor: style("--line"), zerolinecolor: style("--line"), linecolor: style("--line"),
  };
  const layout = {
    margin: { l: 8, r: 16, t: 8, b: 8 },
    paper_bgcolor: style("--panel"), plot_bgcolor: style("--panel"),
    font: { color: style("--text"), size: 12, family: getComputedStyle(document.body).fontFamily },
    showlegend: false,
    dragmode: isTouched ? false : "zoom",
    hoverlabel: { align: "left", namelength: 30 },
    ...extra,
  };
  // Labels make room on their own side: on both, Plotly may not come to an end.
  layout.xaxis = { ...axis, automargin: "bottom", ...extra.xaxis };
  layout.yaxis = { ...axis, automargin: "left", fixedrange: true, ...extra.yaxis };
  return layout;
}

const padded = ([first, last]) => [first - 0.02 * (last - first), last + 0.02 * (last - first)];

function stepAxis() {
  return {
    title: { text: "step", standoff: 4 },
    tickformat: ",~f", nticks: 6,
    ...(ends[0] < ends[1] ? { range: chosen.steps ? [...chosen.steps] : padded(ends) } : {}),
  };
}

/** The places of the chosen steps, and one more on both sides, so that lines leave the picture. */
function placesOfSteps(steps) {
  if (!chosen.steps) return [0, steps.length];
  let first = steps.findIndex((step) => step >= chosen.steps[0]);
  first = first === -1 ? steps.length : first;
  let end = steps.findIndex((step) => step > chosen.steps[1]);
  end = end === -1 ? steps.length : end;
  return [Math.max(first - 1, 0), Math.min(end + 1, steps.length)];
}

/** The tensor that each of a line's values is of. */
const tensorsOf = ({ tensors }) => tensors.places.map((place) => asText(tensors.names[place]));

function curves(panel, settings) {
  const choice = panel.choices[settings.choice ?? 0];
  const isLog = settings.isLog ?? choice.isLog;
  const span = [Infinity, -Infinity];
  const data = choice.lines.filter(isShown).map((line) => {
    const steps = unpacked(line.steps);
    const [first, end] = placesOfSteps(steps);
    let values = unpacked(line.values).subarray(first, end);
    if (isLog) values = values.map((value) => (value > 0 ? value : NaN));
    for (const value of values) {
      // One that is infinite has no place, and would take the others' ticks away.
      if (!Number.isFinite(value)) continue;
      if (value < span[0]) span[0] = value;
      if (value > span[1]) span[1] = value;
    }
    return {
      type: "scatter",
      mode: end - first > 60 ? "lines" : "lines+markers",
      name: asText(nameOf(line)),
      x: steps.subarray(first, end),
      y: values,
      line: { color: colourOf(line), width: widthOf(line) },
      marker: { size: 4 },
      ...(line.tensors ? { text: tensorsOf(line).slice(first, end) } : {}),
      hovertemplate: line.tensors ? "%{y:.4g} in %{text}" : "%{y:.4g}",
    };
  });
  return {
    data,
    layout: layoutOf({
      ...findingMarks(),
      hovermode: "x unified",
      xaxis: { ...stepAxis(), unifiedhovertitle: { text: "step %{x:,}" } },
      yaxis: isLog
        ? { type: "log", ...logarithmicTicks(span) }
        : span[0] === span[1] && span[0] !== 0 ? constantTicks(span[0]) : { tickformat: ".4~g" },
    }),
  };
}

const shortNumber = (value) =>
  value >= 1e-3 && value < 1e5 ? String(value) : value.toExponential();

const constantTicks = (value) => ({
  tickvals: [0, value], ticktext: ["0", shortNumber(value)],
  range: [-0.1 * value, 1.5 * value],
});

/** Ticks at powers of ten; also at two and five of them, or evenly, where there are few. */
function logarithmicTicks([low, high]) {
  if (!(low < high)) return {};
  const ticks = [];
  if (high < 4 * low) {
    const rough = (high - low) / 4, unit = 10 ** Math.floor(Math.log10(rough));
    const step = unit * [1, 2, 5, 10].find((each) => each * unit >= rough);
    for (let tick = Math.ceil(low / step); tick * step <= high; tick += 1) ticks.push(tick * step);
  } else {
    const exponents = [Math.floor(Math.log10(low)), Math.ceil(Math.log10(high))];
    const every = Math.max(1, Math.ceil((exponents[1] - exponents[0]) / 6));
    const digits = high > 30 * low ? [1] : [1, 2, 5];
    for (let at = Math.ceil(exponents[0] / every) * every; at <= exponents[1]; at += every) {
      for (const digit of digits) ticks.push(digit * 10 ** at);
    }
  }
  const exact = ticks.map((tick) => Number(tick.toPrecision(3)));
  return { tickvals: exact, ticktext: exact.map(shortNumber) };
}

/** Where findings were raised; codes at one step share a line and a label. */
function findingMarks() {
  const byStep = new Map();
  for (const each of report.findings.filter(isShown)) {
    if (chosen.steps && (each.step < chosen.steps[0] || each.step > chosen.steps[1])) continue;
    byStep.set(each.step, [...(byStep.get(each.step) ?? []), each]);
  }
  const marks = [...byStep].sort(([a], [b]) => a - b);
  return {
    shapes: marks.map(([step]) => ({
      type: "line", layer: "below", yref: "paper", y0: 0, y1: 1, x0: step, x1: step,
      line: { color: style("--warning"), width: 1, dash: "dot" },
    })),
    annotations: marks.map(([step, found], place) => ({
      text: [...new Set(found.map((each) => each.code))].join("<br>"),
      showarrow: false, font: { color: style("--warning"), size: 10 }, bgcolor: style("--panel"),
      opacity: 0.9, x: step, yref: "paper", y: 1 - 0.12 * (place % 4), yanchor: "top", xshift: 3,
      xanchor: step > (ends[0] + ends[1]) / 2 ? "right" : "left",
    })),
  };
}

/** Lines at the eps that were used. */
function epsMarks(values, isVertical, placeOf) {
  const across = isVertical ? ["y", "x"] : ["x", "y"];
  return {
    shapes: values.map((eps) => ({
      type: "line", layer: "above",
      [`${across[0]}ref`]: "paper", [`${across[0]}0`]: 0, [`${across[0]}1`]: 1,
      [`${across[1]}0`]: placeOf(eps), [`${across[1]}1`]: placeOf(eps),
      line: { color: style("--warning"), width: 2, dash: "dash" },
    })),
    annotations: values.map((eps) => ({
      text: `eps ${eps.toExponential()}`,
      showarrow: false, font: { color: style("--warning") }, bgcolor: style("--panel"),
      ...(isVertical
        ? { x: Math.log10(eps), yref: "paper", y: 1, xanchor: "left", yanchor: "top", xshift: 4 }
        : { xref: "paper", x: 0, y: placeOf(eps), xanchor: "left", yanchor: "bottom", yshift: 2 }),
    })),
  };
}

const epsTicks = (lines) => {
  const at = lines.flatMap((line) => Array.from(unpacked(line.at)));
  const { tickvals, ticktext } = decades(Math.log10(Math.min(...at)), Math.log10(Math.max(...at)), 7);
  return { tickvals: tickvals.map((exponent) => Number(`1e${exponent}`)), ticktext };
};

function eps_curve(panel) {
  const lines = panel.lines.filter(isShown);
  const used = sorted(new Set(lines.flatMap((line) => line.eps)));
  return {
    data: lines.map((line) => ({
      type: "scatter", mode: "lines",
      name: asText(nameOf(line)),
      x: unpacked(line.at), y: unpacked(line.shares),
      line: { color: colourOf(line), width: 1.6 },
      hovertemplate: `%{y:.4g} at step ${line.step.toLocaleString("en")}`,
    })),
    layout: layoutOf({
      hovermode: "x unified",
      ...epsMarks(used, true, (eps) => eps),
      xaxis: {
        type: "log", title: { text: "eps", standoff: 4 }, ...epsTicks(panel.lines),
        unifiedhovertitle: { text: "eps %{x:.2g}" },
      },
      yaxis: { range: [-0.02, 1.02], tickformat: ".0%" },
    }),
  };
}

const asRows = (values, columns, change) => {
  const rows = [];
  for (let start = 0; start < values.length; start += columns) {
    rows.push(Array.from(values.subarray(start, start + columns), change ?? ((value) => value)));
  }
  return rows;
};

/** Ticks at powers of ten between two of them, few enough to be read. */
function decades(lowest, highest, most = 8) {
  const every = Math.max(1, Math.ceil((highest - lowest) / most));
  const ticks = [];
  for (let tick = Math.ceil(lowest / every) * every; tick <= highest; tick += every) ticks.push(tick);
  return { tickvals: ticks, ticktext: ticks.map(powerOfTen) };
}

/** Columns stand where their steps are; Plotly puts an edge halfway between two. */
const stepsOf = (map) => Array.from(unpacked(map.steps));

function histogram(panel, settings) {
  const map = panel.maps[settings.map];
  const steps = stepsOf(map);
  const shares = asRows(unpacked(map.shares), steps.length, (share) => (share > 0 ? share : null));
  const centers = shares.map((_, octave) => (map.lowest + octave + 0.5) * Math.log10(2));
  const marks = map.quantity === "denominator" ? map.eps : [];
  const low = Math.min(centers[0], ...marks.map(Math.log10));
  const high = Math.max(centers.at(-1), ...marks.map(Math.log10));
  return {
    data: [{
      type: "heatmap", x: steps, y: centers, z: shares,
      colorscale: SHARES[chosen.theme],
      colorbar: { thickness: 10, outlinewidth: 0, tickformat: ".0%" },
      customdata: shares.map((row, octave) =>
        row.map(() => (2 ** (map.lowest + octave)).toExponential(1))),
      hovertemplate: "step %{x:,}<br>%{z:.2%} from %{customdata} to its double<extra></extra>",
    }],
    layout: layoutOf({
      hovermode: "closest",
      ...epsMarks(marks, false, Math.log10),
      xaxis: stepAxis(),
      yaxis: { ...decades(low, high), range: [low - 0.4, high + 0.4] },
    }),
  };
}

function layers(panel, settings, place) {
  const map = panel.maps[settings.map];
  const steps = stepsOf(map);
  const values = unpacked(map.values);
  const isLog = settings.isLog ?? map.isLog;
  const finite = values.filter(Number.isFinite);
  const shown = isLog ? finite.filter((value) => value > 0).map(Math.log10) : finite;
  let [low, high] = [Infinity, -Infinity];
  for (const value of shown) { low = Math.min(low, value); high = Math.max(high, value); }
  const isSigned = !isLog && low < 0;
  const raw = asRows(values, steps.length);
  const height = Math.min(Math.max(140 + 18 * map.layers.length, 250), 640);
  place.style.height = `${height}px`;
  const every = Math.ceil(map.layers.length / ((height - 60) / 16));
  const ticks = map.layers.map((_, row) => row).filter((row) => row % every === 0);
  const room = place.clientWidth < 600 ? 14 : 40;
  const short = (name) => (name.length > room ? `…${name.slice(1 - room)}` : name);
  return {
    data: [{
      type: "heatmap", x: steps, y: map.layers.map((_, row) => row),
      z: isLog ? raw.map((row) => row.map((value) => (value > 0 ? Math.log10(value) : null))) : raw,
      customdata: raw,
      text: map.layers.map((name) => Array(steps.length).fill(asText(name))),
      hovertemplate: `%{text}<br>step %{x:,}<br>${map.statistic} %{customdata:.4g}<extra></extra>`,
      colorscale: isSigned ? SIGNED_VALUES : VALUES,
      ...(isSigned ? { zmid: 0 } : {}),
      colorbar: {
        thickness: 10, outlinewidth: 0, exponentformat: "power",
        ...(isLog ? decades(low, high, 5) : { tickformat: ".3~g" }),
      },
    }],
    layout: layoutOf({
      hovermode: "closest",
      xaxis: map.event === undefined
        ? stepAxis() : { title: { text: "step", standoff: 4 }, tickformat: ",~f", nticks: 6 },
      yaxis: {
        autorange: "reversed", showgrid: false, zeroline: false,
        tickvals: ticks, ticktext: ticks.map((row) => asText(short(map.layers[row]))),
      },
    }),
  };
}

const DRAWINGS = { curves, eps_curve, histogram, layers, events: layers };

// ---- A panel: its controls, its picture

class Panel {
  constructor(figure) {
    this.figure = figure;
    this.place = figure.querySelector(".plot");
    this.title = figure.dataset.panel;
    this.kind = figure.dataset.drawing;
    this.data = report.panels[this.title];
    this.settings = { map: 0 };
    this.isDue = true;
    this.isVisible = false;
    this.addControls(figure.querySelector(".controls"));
  }

  addControls(controls) {
    if (this.data.choices?.length > 1) {
      const options = this.data.choices.map((choice) => choice.label);
      controls.append(selection("key", options, (choice) => this.set({ choice, isLog: undefined })));
    }
    if (this.data.maps) {
      // Of each field that tells the maps apart a selection; together they choose one.
      const fields = ["run", "event", "statistic", "quantity", "scope"].filter(
        (field) => new Set(this.data.maps.map((map) => map[field])).size > 1 ||
          (field === "event" && this.kind === "events"));
      const picked = { ...this.data.maps[this.firstMap()] };
      const choosers = [];
      this.settings.map = this.firstMap();
      for (const field of fields) {
        const found = new Set(this.data.maps.map((map) => map[field]));
        const options = field === "run" ? sorted(found) : [...found];
        const labels = field === "run" ? options.map((run) => report.runs[run]) : options;
        const chooser = selection(field, labels, (place) => {
          picked[field] = options[place];
          let map = this.data.maps.findIndex((each) =>
            fields.every((other) => each[other] === picked[other]));
          if (map === -1) {
            // Not every run has every statistic and scope: the nearest map, and what it is of.
            map = this.data.maps.findIndex((each) => each[field] === picked[field]);
            Object.assign(picked, this.data.maps[map]);
            for (const choose of choosers) choose();
          }
          this.set({ map, isLog: undefined });
        }, options.indexOf(picked[field]));
        choosers.push(() => { chooser.selectedIndex = options.indexOf(picked[field]); });
        if (field === "statistic") {
          for (const option of chooser.options) {
            option.title = this.data.maps.find((map) => map.statistic === option.text).meaning;
          }
        }
        controls.append(chooser);
      }
    }
    if (this.kind === "curves" || this.isOfLayers()) {
      this.log = button("log", () => this.set({ isLog: !this.isLog() }));
      this.log.ariaLabel = `${this.title} on a logarithmic scale`;
      controls.append(this.log);
    }
    const save = button("PNG", () => this.save());
    save.ariaLabel = `save ${this.title} as a PNG`;
    controls.append(save);
  }

  /** What is looked at first: the denominators, how far layers move, and what moved them. */
  firstMap() {
    const statistic = this.kind === "events" ? "grad_rms" : "update_to_weight";
    const first = this.data.maps.findIndex((map) =>
      map.quantity === "denominator" || map.statistic === statistic);
    return Math.max(first, 0);
  }

  isOfLayers() { return this.kind === "layers" || this.kind === "events"; }

  isLog() {
    const shown = this.isOfLayers()
      ? this.data.maps[this.settings.map] : this.data.choices[this.settings.choice ?? 0];
    return this.settings.isLog ?? shown.isLog;
  }

  set(settings) {
    Object.assign(this.settings, settings);
    this.refresh();
  }

  refresh() {
    this.isDue = true;
    if (this.isVisible) this.draw();
  }

  draw() {
    if (!this.isDue) return;
    this.isDue = false;
    this.log?.setAttribute("aria-pressed", this.isLog());
    const { data, layout } = DRAWINGS[this.kind](this.data, this.settings, this.place);
    const isFirst = !this.place.data;
    // Without it Plotly takes unchanged arrays for no reason to look for the ends of an axis.
    layout.datarevision = this.revision = (this.revision ?? 0) + 1;
    Plotly.react(this.place, data, layout, { displayModeBar: false, responsive: true, doubleClick: false });
    if (isFirst) {
      this.place.on("plotly_relayout", (change) => this.follow(change));
      this.place.on("plotly_doubleclick", () => {
        if (this.hasSteps()) show({ steps: null });
        if (this.kind === "events") this.refresh();
      });
    }
  }

  /** Whether its steps are those of the whole run. */
  hasSteps() { return this.kind !== "eps_curve" && this.kind !== "events"; }

  /** Takes a zoom to all other panels. */
  follow(change) {
    const range = change["xaxis.range"] ?? [change["xaxis.range[0]"], change["xaxis.range[1]"]];
    if (this.hasSteps() && range[0] !== undefined) show({ steps: range.map(Number) });
  }

  /** A picture for a paper or a slide: on white, with its title and its legend. */
  save() {
    const theme = chosen.theme;
    root.dataset.theme = chosen.theme = "light";
    const { data, layout } = DRAWINGS[this.kind](this.data, this.settings, this.place);
    const map = this.data.maps?.[this.settings.map];
    const choice = this.data.choices?.[this.settings.choice ?? 0];
    const isScoped = (choice ?? this.data).lines?.some((line) => line.scope !== null);
    const named = [
      this.title, choice && this.data.choices.length > 1 && choice.label,
      map?.event, map?.statistic ?? map?.quantity, map?.scope,
      isComparison && (map ? report.runs[map.run] : isScoped && chosen.scope),
    ].filter(Boolean);
    const unit = map?.unit ?? this.figure.dataset.unit;
    layout.title = {
      text: asText(named.join(", ") + (unit ? ` [${unit}]` : "")), x: 0.02, font: { size: 20 },
    };
    layout.font.size = 16;
    layout.margin = { l: 12, r: 12, t: data.length > 1 ? 84 : 52, b: 12 };
    layout.showlegend = data.length > 1;
    layout.legend = { orientation: "h", x: 1, xanchor: "right", y: 1.02, yanchor: "bottom" };
    for (const trace of data) if (trace.line) trace.line.width += 0.8;
    root.dataset.theme = chosen.theme = theme;
    const name = named.join("_").replaceAll(/[^\w.=-]+/g, "_").replaceAll(/^_+|_+$/g, "");
    return Plotly.downloadImage({ data, layout }, {
      format: "png", width: 900, height: this.isOfLayers() ? Math.max(500, this.place.clientHeight) : 500,
      scale: 3, filename: `adam_${name}`,
    });
  }
}

function button(text, act) {
  const made = document.createElement("button");
  made.type = "button";
  made.textContent = text;
  made.addEventListener("click", act);
  return made;
}

function selection(label, options, act, first = 0) {
  const made = document.createElement("select");
  made.ariaLabel = label;
  made.append(...options.map((option) => new Option(option)));
  made.selectedIndex = first;
  made.addEventListener("change", () => act(made.selectedIndex));
  return made;
}

// ---- The page

const panels = [...document.querySelectorAll(".panel")].map((figure) => new Panel(figure));

/** Changes what is chosen, and draws again what is in sight. */
function show(change) {
  Object.assign(chosen, change);
  root.dataset.theme = chosen.theme;
  const [first, last] = chosen.steps ?? ends;
  firstStep.value = Math.ceil(first);
  lastStep.value = Math.floor(last);
  for (const each of legend.children) {
    each.setAttribute("aria-pressed", !chosen.hidden.has(each.name));
    each.style.setProperty("--mark", each.colour());
  }
  for (const panel of panels) panel.refresh();
}

const [firstStep, lastStep] = ["first-step", "last-step"].map((id) => document.getElementById(id));
for (const input of [firstStep, lastStep]) {
  input.addEventListener("change", () => {
    let steps = [Number(firstStep.value), Number(lastStep.value)];
    // An end that passes the other leaves that one at its outermost.
    if (steps[0] >= steps[1]) steps = input === firstStep ? [steps[0], ends[1]] : [ends[0], steps[1]];
    show({ steps: steps[0] < steps[1] ? steps : null });
  });
}
document.getElementById("all-steps").addEventListener("click", () => show({ steps: null }));
document.getElementById("theme").addEventListener("click", () =>
  show({ theme: chosen.theme === "light" ? "dark" : "light" }));

const legend = document.getElementById("legend");
names.forEach((name, place) => {
  const mark = button(name, () => {
    chosen.hidden.has(name) ? chosen.hidden.delete(name) : chosen.hidden.add(name);
    show({});
  });
  mark.name = name;
  mark.colour = () => COLOURS[chosen.theme][place % COLOURS[chosen.theme].length];
  legend.append(mark);
});

if (isComparison && scopes.length > 1) {
  const scope = document.getElementById("scope");
  scope.append(...scopes.map((each) => new Option(each)));
  scope.addEventListener("change", () => show({ scope: scope.value }));
  document.getElementById("scope-choice").hidden = false;
}

for (const caption of document.querySelectorAll("figcaption")) {
  const meaning = caption.querySelector(".meaning");
  caption.querySelector(".explain").addEventListener("click", () => meaning.classList.toggle("is-open"));
  caption.addEventListener("focusout", () => caption.classList.remove("is-dismissed"));
  caption.addEventListener("mouseleave", () => {
    caption.classList.remove("is-dismissed");
    meaning.classList.remove("is-open");
  });
}
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  for (const open of document.querySelectorAll(".is-open")) open.classList.remove("is-open");
  for (const caption of document.querySelectorAll("figcaption:hover, figcaption:focus-within")) {
    caption.classList.add("is-dismissed");
  }
});

// A panel is drawn when it comes into sight.
const sight = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    const panel = panels.find((each) => each.place === entry.target);
    panel.isVisible = entry.isIntersecting;
    if (panel.isVisible) panel.draw();
  }
}, { rootMargin: "300px" });
for (const panel of panels) sight.observe(panel.place);

show({ theme: matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light" });
