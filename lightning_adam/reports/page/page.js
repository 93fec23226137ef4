const decodeBase64 = (base64) => Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));

/** Runs a compressed script. */
async function runCompressedScript(base64) {
  const stream = new Blob([decodeBase64(base64)]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = document.createElement("script");
  script.textContent = await new Response(stream).text();
  document.head.append(script);
}

const report = JSON.parse(document.getElementById("data").textContent);
await runCompressedScript(document.getElementById("plotly").textContent);
const root = document.documentElement;
const runNames = report.runs.map((run) => run.name);
const isComparison = report.runs.length > 1;
const isTouchScreen = matchMedia("(pointer: coarse)").matches;

// The colors of Okabe and Ito, lighter on a dark background.
const COLORS = {
  light: ["#0072b2", "#d55e00", "#008060", "#a8407c", "#8a6d00", "#4a4fc4", "#5f6b76"],
  dark: ["#56b4e9", "#f0803c", "#2dbd94", "#e08cc0", "#e3c13b", "#a3a6ff", "#aab4be"],
};
const FRACTION_COLORS = {
  light: [[0, "#dcebf8"], [0.5, "#4292c6"], [1, "#08306b"]],
  dark: [[0, "#17314c"], [0.5, "#4292c6"], [1, "#dcebf8"]],
};
const VALUE_COLORS = "Viridis";
const SIGNED_COLORS = "RdBu";
const OUTLIER_FRACTION = 0.005;
const MAX_COLORED_LAYERS = 3;
const MAX_BARS = 80;

// The state of the page: theme, range of the x-axis, hidden lines, scope, axis, smoothing.
const state = { theme: "light", range: null, hidden: [], scope: null, axis: "step", smoothing: 0 };

const ARRAYS = { float32: Float32Array, float64: Float64Array, uint32: Uint32Array };
function unpack(packed) {
  if (!packed.array) {
    packed.array = new ARRAYS[packed.type](decodeBase64(packed.bytes).buffer);
    packed.bytes = null;
  }
  return packed.array;
}

/** Escapes a name, as Plotly parses HTML tags in texts. */
const escapeHtml = (name) =>
  String(name).replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
const sortNumbers = (numbers) => Array.from(numbers).sort((one, other) => one - other);
const quantile = (ordered, share) => ordered[Math.round(share * (ordered.length - 1))];

// ---- Scopes, lines, steps

const charts = Object.values(report.charts);
// Metrics of the module have no scope.
const scopes = [...new Set(charts.flatMap((chart) => chart.lines ?? []).map((line) => line.scope ?? [])
  .flat())].sort(
  (one, other) => (other === "model") - (one === "model") || one.localeCompare(other));
state.scope = scopes[0] ?? "model";

/** Returns the name of a line: its run in a comparison, otherwise its scope. */
const nameOf = (line) => (isComparison ? runNames[line.run] : line.scope ?? runNames[0]);
const names = isComparison ? runNames : scopes;
const colorOf = (line) => {
  const place = isComparison ? line.run : Math.max(scopes.indexOf(line.scope), 0);
  return COLORS[state.theme][place % COLORS[state.theme].length];
};
const DASHES = { p1: "dot", p99: "dash" };
/** The line of the model is drawn last and widest. */
const isModel = (line) => scopes.indexOf(line.scope) <= 0;
const isShown = (line) =>
  !state.hidden.includes(nameOf(line)) &&
  (!isComparison || line.scope === null || line.scope === state.scope);
const shownLines = (chart) => {
  const lines = chart.lines.filter(isShown);
  return isComparison ? lines : [...lines.filter((line) => !isModel(line)), ...lines.filter(isModel)];
};

/** Returns the first and the last position on the x-axis of a chart. */
function endsOf(chart) {
  const allEnds = [Infinity, -Infinity];
  for (const each of [...(chart.lines ?? []), ...(chart.maps ?? [])]) {
    const steps = each.steps ? unpack(each.steps) : [];
    if (!steps.length) continue;
    const [first, last] = [positionOf(each.run, steps[0]), positionOf(each.run, steps.at(-1))];
    allEnds[0] = Math.min(allEnds[0], first);
    allEnds[1] = Math.max(allEnds[1], last);
  }
  return allEnds;
}
const allEnds = () => charts.filter((chart) => chart.kind !== "events").map(endsOf).reduce(
  (all, each) => [Math.min(all[0], each[0]), Math.max(all[1], each[1])], [Infinity, -Infinity]);

/** Returns the position of a step on the x-axis: the step, or the time since the start. */
const maxSeconds = Math.max(...report.runs.map((run) => run.times?.seconds.at(-1) ?? 0));
const [timeUnit, secondsOfUnit] =
  maxSeconds > 7200 ? ["h", 3600] : maxSeconds > 120 ? ["min", 60] : ["s", 1];
const isTime = () => state.axis === "time";
function positionOf(run, step) {
  if (!isTime()) return step;
  const times = report.runs[run].times;
  if (!times) return NaN;
  let next = times.steps.findIndex((each) => each >= step);
  if (next === -1) next = times.steps.length - 1;
  const before = Math.max(next - 1, 0);
  const width = times.steps[next] - times.steps[before];
  const share = width ? Math.min(Math.max((step - times.steps[before]) / width, 0), 1) : 0;
  const seconds = times.seconds[before] + share * (times.seconds[next] - times.seconds[before]);
  return seconds / secondsOfUnit;
}
const positionsOf = (run, steps) =>
  isTime() ? Array.from(steps, (step) => positionOf(run, step)) : steps;

// ---- Parts of a layout

const style = (name) => getComputedStyle(root).getPropertyValue(name).trim();

function createLayout(extra) {
  const axis = {
    gridcolor: style("--line"), zerolinecolor: style("--line"), linecolor: style("--line"),
  };
  const layout = {
    margin: { l: 8, r: 16, t: 8, b: 8 },
    paper_bgcolor: style("--panel"), plot_bgcolor: style("--panel"),
    font: { color: style("--text"), size: 12, family: getComputedStyle(document.body).fontFamily },
    showlegend: false,
    dragmode: isTouchScreen ? false : "zoom",
    hoverlabel: { align: "left", namelength: 30 },
    ...extra,
  };
  // Automatic margins on both sides may keep Plotly from terminating.
  layout.xaxis = { ...axis, automargin: "bottom", ...extra.xaxis };
  layout.yaxis = { ...axis, automargin: "left", fixedrange: true, ...extra.yaxis };
  return layout;
}

const padRange = ([first, last]) => [first - 0.02 * (last - first), last + 0.02 * (last - first)];

function stepAxis(own) {
  const title = isTime() ? `time (${timeUnit})` : "step";
  return {
    title: { text: title, standoff: 4 },
    ...(isTime() ? {} : { tickformat: own[1] < 1e4 ? ",~f" : "~s" }), nticks: 5, tickangle: 0,
    ...(state.range ? { range: [...state.range] } : own[0] < own[1] ? { range: padRange(own) } : {}),
  };
}

/** Returns the points within the range and one more on both sides, so that lines leave the plot. */
function rangeInView(positions) {
  if (!state.range) return [0, positions.length];
  let first = positions.findIndex((each) => each >= state.range[0]);
  first = first === -1 ? positions.length : first;
  let end = positions.findIndex((each) => each > state.range[1]);
  end = end === -1 ? positions.length : end;
  return [Math.max(first - 1, 0), Math.min(end + 1, positions.length)];
}

const formatNumber = (value) => {
  const exact = Number(value.toPrecision(3));
  const size = Math.abs(exact);
  return size === 0 || (size >= 1e-3 && size < 1e5) ? String(exact) : exact.toExponential();
};
const formatValue = (value, unit) =>
  unit === "fraction" ? `${Number((100 * value).toPrecision(3))}%` : formatNumber(value);

/** Returns ticks at powers of ten between two exponents. */
function decades(lowest, highest, most = 8) {
  const every = Math.max(1, Math.ceil((highest - lowest) / most));
  const ticks = [];
  for (let tick = Math.ceil(lowest / every) * every; tick <= highest; tick += every) ticks.push(tick);
  return { tickvals: ticks, ticktext: ticks.map((exponent) => `1e${exponent}`) };
}

/** Returns ticks at powers of ten; in short ranges also at 2 and 5, or evenly spaced. */
function logarithmicTicks([low, high]) {
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
  return { tickvals: exact, ticktext: exact.map(formatNumber) };
}

/** Returns the axis of values: without outliers, from 0 for fractions, with close references. */
function createValueAxis(values, { isLog, unit, references, isWhole }) {
  const scale = isLog ? Math.log10 : (value) => value;
  const ordered = sortNumbers(values.filter((value) => Number.isFinite(value) && (value > 0 || !isLog)));
  if (!ordered.length) return { axis: {}, low: NaN, high: NaN, isCut: false };
  const all = [scale(ordered[0]), scale(ordered.at(-1))];
  let [low, high] = all;
  if (ordered.length >= 40 && !isWhole) {
    const core = [OUTLIER_FRACTION, 1 - OUTLIER_FRACTION].map((share) => scale(quantile(ordered, share)));
    const reach = 3 * Math.max(core[1] - core[0], isLog ? 0.3 : 1e-3 * Math.abs(core[1]));
    if (high > core[1] + reach) high = core[1] + 0.2 * reach;
    if (low < core[0] - reach) low = core[0] - 0.2 * reach;
  }
  const isCut = low !== all[0] || high !== all[1];
  if (unit === "fraction" && low >= 0 && !isLog) low = 0;
  const span = Math.max(high - low, isLog ? 0.5 : 0.05 * Math.max(Math.abs(low), Math.abs(high)));
  for (const { value } of references) {
    const at = scale(value);
    if (at >= low - span && at <= high + span) [low, high] = [Math.min(low, at), Math.max(high, at)];
  }
  if (high - low <= 1e-6 * Math.abs(high)) {
    if (isLog) [low, high] = [low - 0.5, high + 0.5];
    else if (low === 0) [low, high] = [0, 1];
    else [low, high] = [Math.min(0, 1.5 * low), Math.max(0, 1.5 * high)];
  } else {
    const room = 0.06 * (high - low);
    [low, high] = [unit === "fraction" && low === 0 ? 0 : low - room, high + room];
  }
  if (unit === "fraction" && !isLog && ordered.at(-1) <= 1) high = Math.min(high, 1.04);
  const axis = { range: [low, high], ...(isLog ? { type: "log" } : {}) };
  if (isLog) Object.assign(axis, logarithmicTicks([10 ** low, 10 ** high]));
  else axis.tickformat = unit === "fraction" ? ".4~%" : ".4~g";
  return { axis, low, high, isCut };
}

/** Returns lines at healthy values and thresholds, with labels at the edge for those beyond. */
function referenceMarks(references, { low, high }, isLog, unit, isVertical = false) {
  const [across, along] = isVertical ? ["y", "x"] : ["x", "y"];
  const found = { shapes: [], annotations: [] };
  const positionOfValue = ({ value }) => (isLog ? Math.log10(value) : value);
  const edge = high - 0.12 * (high - low);
  const isAtEdge = (each) => each.code && positionOfValue(each) > edge && positionOfValue(each) <= high;
  const stacked = { above: references.some(isAtEdge) ? 1 : 0, below: 0 };
  for (const [place, each] of references.entries()) {
    const at = positionOfValue(each);
    if (!Number.isFinite(at)) continue;
    const color = style(each.code ? "--warning" : "--healthy");
    const text = escapeHtml(`${each.label} ${formatValue(each.value, unit)}`);
    const label = { text, showarrow: false, font: { color, size: 11 }, bgcolor: style("--panel") };
    if (at < low || at > high) {
      if (isVertical) continue;
      const side = at > high ? "above" : "below";
      const shift = each.code ? 13 * stacked[side]++ : 0;
      found.annotations.push({
        ...label, text: `${side === "above" ? "↑" : "↓"} ${text}`,
        xref: "paper", x: each.code ? 1 : 0, xanchor: each.code ? "right" : "left",
        yref: "paper", y: side === "above" ? 1 : 0, yanchor: side === "above" ? "top" : "bottom",
        yshift: side === "above" ? -shift : shift,
      });
      continue;
    }
    found.shapes.push({
      type: "line", layer: "below", [`${across}ref`]: "paper", [`${across}0`]: 0, [`${across}1`]: 1,
      [`${along}0`]: each.value, [`${along}1`]: each.value,
      line: { color, width: 1.2, dash: each.code ? "dash" : "dot" },
    });
    found.annotations.push(isVertical
      ? { ...label, x: at, yref: "paper", y: 1, xanchor: "left", yanchor: "top", xshift: 2, yshift: -14 * place }
      : { ...label, xref: "paper", x: each.code ? 1 : 0, y: at, yanchor: "bottom",
        xanchor: each.code ? "right" : "left" });
  }
  return found;
}

const isOfShownRun = (each) => !isComparison || !state.hidden.includes(runNames[each.run]);
const referencesOf = (chart) =>
  chart.references.filter((each) => each.runs.some((run) => isOfShownRun({ run })));

const MAX_LABELS = 3;

/** Merges overlapping intervals. */
function mergeIntervals(intervals) {
  const found = [];
  for (const [start, end] of intervals.sort(([one], [other]) => one - other)) {
    if (found.length && start <= found.at(-1)[1]) found.at(-1)[1] = Math.max(found.at(-1)[1], end);
    else found.push([start, end]);
  }
  return found;
}

/** Returns intervals of findings, by code or combined if there are many, and failures. */
function findingMarks(chart, own) {
  const [first, last] = state.range ?? own;
  const labelOf = ({ code, optimizer }) => (optimizer ? `${code} (${optimizer})` : code);
  const shown = report.findings.filter((each) =>
    isOfShownRun(each) && (chart.isOverview || each.statistics.includes(chart.id)));
  const { size } = new Set(shown.map(labelOf));
  const isMany = size > MAX_LABELS;
  const groups = new Map();
  for (const each of shown) {
    const name = isMany ? "" : [each.run, labelOf(each)].join("\n");
    groups.set(name, [...(groups.get(name) ?? []), each]);
  }
  const marks = [...groups.values()].flatMap((found) => {
    const color = style(found.some(({ severity }) => severity === "error") ? "--error" : "--warning");
    const intervals = found.map(({ run, start, end }) =>
      [positionOf(run, start), end === null ? own[1] : positionOf(run, end)]);
    return mergeIntervals(intervals).map(([start, end], place) => (
      { start, end, color, label: place ? "" : isMany ? `${size} findings` : labelOf(found[0]) }));
  });
  if (chart.isOverview) {
    for (const each of report.events.filter(isOfShownRun)) {
      const at = positionOf(each.run, each.step - 1);
      marks.push({ start: at, end: at, color: style("--error"), label: `⚑ ${each.reason}` });
    }
  }
  const within = marks.filter(({ start, end }) => end >= first && start <= last);
  const shapes = within.flatMap(({ start, end, color }) => [
    { type: "rect", layer: "below", yref: "paper", y0: 0, y1: 1, x0: start, x1: end,
      fillcolor: color, opacity: 0.1, line: { width: 0 } },
    { type: "line", layer: "below", yref: "paper", y0: 0, y1: 1, x0: start, x1: start,
      line: { color, width: 1, dash: "dot" } },
  ]);
  const labeled = within.filter(({ label }) => label).sort((one, other) => one.start - other.start);
  const annotations = labeled.map(({ start, color, label }, place) => ({
    text: escapeHtml(label), showarrow: false, font: { color, size: 11 }, bgcolor: style("--panel"),
    opacity: 0.9, x: Math.max(start, first), yref: "paper", y: 0.02 + 0.09 * (place % 6),
    yanchor: "bottom", xanchor: start > (first + last) / 2 ? "right" : "left",
  }));
  return { shapes, annotations };
}

const mergeMarks = (...marks) => ({
  shapes: marks.flatMap((each) => each.shapes),
  annotations: marks.flatMap((each) => each.annotations),
});

// ---- Kinds of charts: each function returns the data and layout for Plotly

/** Returns an exponential moving average with bias correction. */
function smooth(values) {
  if (!state.smoothing) return values;
  let average = 0, weight = 0;
  return Array.from(values, (value) => {
    if (!Number.isFinite(value)) return value;
    average = state.smoothing * average + (1 - state.smoothing) * value;
    weight = state.smoothing * weight + 1 - state.smoothing;
    return average / weight;
  });
}

/** Returns the name of the tensor of each value of a line. */
const tensorsOf = ({ tensors }) => tensors.places.map((place) => escapeHtml(tensors.names[place]));

/** Returns the end of a name that fits beside a plot. */
function truncateName(name, place) {
  const room = place.clientWidth < 600 ? 14 : 40;
  return escapeHtml(name.length > room ? `…${name.slice(1 - room)}` : name);
}

/** Draws the values of a single step as bars. */
function bars(labels, values, place, { isLog, unit, references, colors }) {
  const axis = createValueAxis(values, { isLog, unit, references, isWhole: true });
  const [low, high] = isLog ? [axis.low, axis.high] : [Math.min(axis.low, 0), Math.max(axis.high, 0)];
  // Room for the value beside the bar.
  const room = 0.25 * (high - low);
  const few = (ticks = []) => ticks.filter((_, at) => at % Math.ceil(ticks.length / 3) === 0);
  const ticks = isLog
    ? { tickvals: few(axis.axis.tickvals), ticktext: few(axis.axis.ticktext) } : { nticks: 4 };
  return {
    data: [{
      type: "bar", orientation: "h", x: values, y: labels.map((_, row) => row),
      text: values.map((value) => formatValue(value, unit)), textposition: "outside", constraintext: "none",
      cliponaxis: false, textangle: 0, customdata: labels.map(escapeHtml),
      marker: { color: colors ?? style("--accent") }, hovertemplate: "%{customdata}: %{x:.4g}<extra></extra>",
    }],
    layout: createLayout({
      ...referenceMarks(references, axis, isLog, unit, true),
      hovermode: "closest", bargap: 0.35,
      xaxis: {
        ...axis.axis, ...ticks, tickangle: 0, fixedrange: true,
        range: [low < 0 && !isLog ? low - room : low, high + room],
      },
      yaxis: {
        autorange: "reversed", showgrid: false, zeroline: false,
        tickvals: labels.map((_, row) => row), ticktext: labels.map((label) => truncateName(label, place)),
      },
    }),
    isCut: false,
  };
}

function curves(chart, settings, place) {
  const lines = shownLines(chart);
  const references = referencesOf(chart);
  if (chart.lines.every((line) => unpack(line.steps).length === 1)) {
    const shown = lines.toReversed();
    return bars(
      shown.map((line) => [nameOf(line), line.part].filter(Boolean).join(" ")),
      shown.map((line) => unpack(line.values)[0]), place,
      { isLog: settings.isLog, unit: chart.unit, references, colors: shown.map(colorOf) });
  }
  const own = endsOf(chart);
  const inView = [];
  const data = lines.flatMap((line) => {
    const positions = positionsOf(line.run, unpack(line.steps));
    const [first, end] = rangeInView(positions);
    let values = unpack(line.values);
    if (settings.isLog) values = values.map((value) => (value > 0 ? value : NaN));
    const shown = smooth(values).slice(first, end);
    // An infinite value would remove the ticks of the axis.
    for (const value of shown) if (Number.isFinite(value)) inView.push(value);
    const name = escapeHtml([nameOf(line), line.part].filter(Boolean).join(" "));
    const trace = {
      type: "scatter", mode: end - first > 60 ? "lines" : "lines+markers",
      x: positions.slice(first, end), marker: { size: 4 },
      line: { color: colorOf(line), width: isComparison ? 1.6 : isModel(line) ? 2.2 : 1.4,
        dash: DASHES[line.part] ?? "solid" },
    };
    const raw = {
      ...trace, name: `${name} (not smoothed)`, y: values.slice(first, end),
      mode: "lines", opacity: 0.25, hoverinfo: "skip",
    };
    return [...(state.smoothing ? [raw] : []), {
      ...trace, name, y: shown,
      ...(line.tensors ? { text: tensorsOf(line).slice(first, end) } : {}),
      hovertemplate: line.tensors ? "%{y:.4g} in %{text}" : "%{y:.4g}",
    }];
  });
  const axis = createValueAxis(inView, {
    isLog: settings.isLog, unit: chart.unit, references, isWhole: settings.isWhole,
  });
  const marks = mergeMarks(
    findingMarks(chart, own), referenceMarks(references, axis, settings.isLog, chart.unit));
  return {
    data,
    layout: createLayout({
      ...marks,
      hovermode: "x unified",
      xaxis: {
        ...stepAxis(own),
        unifiedhovertitle: { text: isTime() ? `%{x:.3g} ${timeUnit}` : "step %{x:,}" },
      },
      yaxis: axis.axis,
    }),
    isCut: axis.isCut,
  };
}

/** Returns lines at the configured values of eps. */
function epsMarks(values, isVertical, positionOfEps) {
  const across = isVertical ? ["y", "x"] : ["x", "y"];
  return {
    shapes: values.map((eps) => ({
      type: "line", layer: "above",
      [`${across[0]}ref`]: "paper", [`${across[0]}0`]: 0, [`${across[0]}1`]: 1,
      [`${across[1]}0`]: positionOfEps(eps), [`${across[1]}1`]: positionOfEps(eps),
      line: { color: style("--warning"), width: 2, dash: "dash" },
    })),
    annotations: values.map((eps) => ({
      text: `eps ${eps.toExponential()}`,
      showarrow: false, font: { color: style("--warning") }, bgcolor: style("--panel"),
      ...(isVertical
        ? { x: Math.log10(eps), yref: "paper", y: 1, xanchor: "left", yanchor: "top", xshift: 4 }
        : { xref: "paper", x: 0, y: positionOfEps(eps), xanchor: "left", yanchor: "bottom", yshift: 2 }),
    })),
  };
}

/** Returns the range of log10(eps) that contains all but a thousandth of the elements. */
function epsRange(lines) {
  const range = [Infinity, -Infinity];
  for (const line of lines) {
    const first = line.shares.findIndex((share) => share >= 0.001);
    const last = line.shares.findLastIndex((share) => share <= 0.999);
    if (first !== -1) range[0] = Math.min(range[0], line.magnitudes[Math.max(first - 1, 0)]);
    if (last !== -1) {
      range[1] = Math.max(range[1], line.magnitudes[Math.min(last + 1, line.magnitudes.length - 1)]);
    }
    for (const eps of line.eps) {
      range[0] = Math.min(range[0], eps);
      range[1] = Math.max(range[1], eps);
    }
  }
  const [low, high] = range.map(Math.log10);
  return low < high ? [low - 0.5, high + 0.5] : [-20, 0];
}

function epsCurve(chart, settings, place) {
  const lines = shownLines(chart);
  const used = sortNumbers(new Set(lines.flatMap((line) => line.eps)));
  const [low, high] = epsRange(lines);
  const { tickvals, ticktext } = decades(low, high, place.clientWidth < 420 ? 4 : 7);
  return {
    data: lines.map((line) => ({
      type: "scatter", mode: "lines",
      name: escapeHtml(nameOf(line)),
      x: line.magnitudes, y: line.shares,
      line: { color: colorOf(line), width: !isComparison && isModel(line) ? 2.2 : 1.6 },
      hovertemplate: `%{y:.4g} at step ${line.step.toLocaleString("en")}`,
    })),
    layout: createLayout({
      hovermode: "x unified",
      ...epsMarks(used, true, (eps) => eps),
      xaxis: {
        type: "log", title: { text: "eps", standoff: 4 }, range: [low, high],
        tickvals: tickvals.map((exponent) => Number(`1e${exponent}`)), ticktext,
        unifiedhovertitle: { text: "eps %{x:.2g}" },
      },
      yaxis: { range: [-0.02, 1.02], tickformat: ".0%" },
    }),
  };
}

const splitRows = (values, columns, change = (value) => value) => {
  const rows = [];
  for (let start = 0; start < values.length; start += columns) {
    rows.push(Array.from(values.subarray(start, start + columns), change));
  }
  return rows;
};

/** Returns the first and the last row that contain all but a thousandth of the elements. */
function occupiedRows(rows) {
  const sums = rows.map((row) => row.reduce((sum, share) => sum + (share || 0), 0));
  const total = sums.reduce((sum, each) => sum + each, 0);
  let below = 0;
  const upTo = sums.map((each) => (below += each) / total);
  const first = upTo.findIndex((share) => share >= 0.001);
  const last = upTo.findIndex((share) => share >= 0.999);
  return [Math.max(first, 0), last === -1 ? rows.length - 1 : last];
}

function histogram(chart, settings) {
  const map = chart.maps[settings.map];
  const positions = Array.from(positionsOf(map.run, unpack(map.steps)));
  const shares = splitRows(unpack(map.shares), positions.length, (share) => (share > 0 ? share : null));
  const centers = shares.map((_, octave) => (map.lowest + octave + 0.5) * Math.log10(2));
  const marks = map.quantity === "denominator" ? map.eps : [];
  const [first, last] = occupiedRows(shares);
  const low = Math.min(centers[first], ...marks.map(Math.log10)) - 0.4;
  const high = Math.max(centers[last], ...marks.map(Math.log10)) + 0.4;
  const isSingle = positions.length === 1;
  const magnitudes = shares.map((_, octave) => (2 ** (map.lowest + octave)).toExponential(1));
  const trace = isSingle
    ? {
      type: "bar", x: centers, y: shares.map((row) => row[0]), customdata: magnitudes, width: Math.log10(2),
      marker: { color: COLORS[state.theme][0] },
      hovertemplate: "%{y:.2%} from %{customdata} to its double<extra></extra>",
    }
    : {
      type: "heatmap", x: positions, y: centers, z: shares,
      colorscale: FRACTION_COLORS[state.theme],
      colorbar: { thickness: 10, outlinewidth: 0, tickformat: ".0%" },
      customdata: shares.map((row, octave) => row.map(() => magnitudes[octave])),
      hovertemplate: `${isTime() ? `%{x:.3g} ${timeUnit}` : "step %{x:,}"}<br>`
        + "%{z:.2%} from %{customdata} to its double<extra></extra>",
    };
  const scale = { ...decades(low, high), range: [low, high] };
  return {
    data: [trace],
    layout: createLayout({
      hovermode: "closest",
      ...epsMarks(marks, isSingle, Math.log10),
      xaxis: isSingle ? { ...scale, fixedrange: true } : stepAxis(endsOf(chart)),
      yaxis: isSingle ? { tickformat: ".0%", rangemode: "tozero" } : scale,
    }),
  };
}

function layers(chart, settings, place) {
  const map = chart.maps[settings.map];
  const positions = map.event === undefined
    ? Array.from(positionsOf(map.run, unpack(map.steps))) : Array.from(unpack(map.steps));
  const values = unpack(map.values);
  const { isLog } = settings;
  if (positions.length === 1) {
    const least = sortNumbers(values).at(-MAX_BARS) ?? -Infinity;
    const rows = map.layers.map((_, row) => row).filter((row) => values[row] >= least);
    place.style.height = `${Math.max(60 + 17 * rows.length, 250)}px`;
    return bars(rows.map((row) => map.layers[row]), rows.map((row) => values[row]), place, {
      isLog, unit: map.unit, references: [],
    });
  }
  const finite = values.filter(Number.isFinite);
  const shown = isLog ? finite.filter((value) => value > 0).map(Math.log10) : finite;
  let [low, high] = [Infinity, -Infinity];
  for (const value of shown) { low = Math.min(low, value); high = Math.max(high, value); }
  const isSigned = !isLog && low < 0;
  const raw = splitRows(values, positions.length);
  const height = Math.min(Math.max(140 + 18 * map.layers.length, 250), 640);
  place.style.height = `${height}px`;
  const every = Math.ceil(map.layers.length / ((height - 60) / 16));
  const ticks = map.layers.map((_, row) => row).filter((row) => row % every === 0);
  return {
    data: [{
      type: "heatmap", x: positions, y: map.layers.map((_, row) => row),
      z: isLog ? raw.map((row) => row.map((value) => (value > 0 ? Math.log10(value) : null))) : raw,
      customdata: raw,
      text: map.layers.map((name) => Array(positions.length).fill(escapeHtml(name))),
      hovertemplate: `%{text}<br>${isTime() ? `%{x:.3g} ${timeUnit}` : "step %{x:,}"}<br>`
        + `${map.statistic} %{customdata:.4g}<extra></extra>`,
      colorscale: isSigned ? SIGNED_COLORS : VALUE_COLORS,
      ...(isSigned ? { zmid: 0 } : {}),
      colorbar: {
        thickness: 10, outlinewidth: 0, exponentformat: "power",
        ...(isLog ? decades(low, high, 5) : { tickformat: map.unit === "fraction" ? ".3~%" : ".3~g" }),
      },
    }],
    layout: createLayout({
      hovermode: "closest",
      xaxis: map.event === undefined
        ? stepAxis([positions[0], positions.at(-1)])
        : { title: { text: "step", standoff: 4 }, tickformat: ",~f", nticks: 6 },
      yaxis: {
        autorange: "reversed", showgrid: false, zeroline: false,
        tickvals: ticks, ticktext: ticks.map((row) => truncateName(map.layers[row], place)),
      },
    }),
  };
}

/** The curves of a map of layers: the selected layer, or the layers with the largest values, in color. */
function drawLayerCurves(chart, settings, place, heatMap) {
  const map = chart.maps[settings.map];
  const positions = map.event === undefined
    ? Array.from(positionsOf(map.run, unpack(map.steps))) : Array.from(unpack(map.steps));
  const values = unpack(map.values);
  const rows = splitRows(values, positions.length,
    (value) => (settings.isLog && !(value > 0) ? NaN : value));
  const peaks = rows.map((row) => Math.max(...row.filter(Number.isFinite)));
  const largest = sortNumbers(rows.keys()).sort((one, other) => peaks[other] - peaks[one]);
  const named = settings.layer ? [map.layers.indexOf(settings.layer)] : largest.slice(0, MAX_COLORED_LAYERS);
  const [first, end] = map.event === undefined ? rangeInView(positions) : [0, positions.length];
  const others = rows.map((_, row) => row).filter((row) => !named.includes(row));
  const x = positions.slice(first, end);
  const inView = rows.flatMap((row) => row.slice(first, end));
  const references = map.event === undefined && report.charts[map.statistic]
    ? referencesOf(report.charts[map.statistic]) : [];
  const axis = createValueAxis(inView, { isLog: settings.isLog, unit: map.unit, references });
  place.style.height = heatMap.style.height;
  return {
    data: [
      {
        // All other layers are one trace with gaps.
        type: "scatter", mode: "lines", name: "other layers", hoverinfo: "skip",
        x: others.flatMap(() => [...x, null]),
        y: others.flatMap((row) => [...rows[row].slice(first, end), null]),
        line: { color: style("--faint"), width: 0.7 }, opacity: 0.45,
      },
      ...named.map((row, color) => ({
        type: "scatter", mode: x.length > 60 ? "lines" : "lines+markers", marker: { size: 4 },
        name: escapeHtml(map.layers[row]), x, y: smooth(rows[row]).slice(first, end),
        line: { color: COLORS[state.theme][color % 7], width: 1.8 }, hovertemplate: "%{y:.4g}",
      })),
    ],
    layout: createLayout({
      ...referenceMarks(references, axis, settings.isLog, map.unit),
      hovermode: "x unified", showlegend: true,
      legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", font: { size: 11 } },
      xaxis: map.event === undefined
        ? { ...stepAxis([positions[0], positions.at(-1)]), unifiedhovertitle: { text: "%{x:,}" } }
        : { title: { text: "step", standoff: 4 }, tickformat: ",~f", nticks: 5 },
      yaxis: axis.axis,
    }),
  };
}

const DRAW_FUNCTIONS = { curves, eps_curve: epsCurve, histogram, layers, events: layers };

// ---- A chart: its controls and its plots

class Panel {
  constructor(figure) {
    this.figure = figure;
    this.chart = report.charts[figure.dataset.chart];
    this.place = figure.querySelector(".plot");
    this.side = figure.querySelector(".side");
    this.settings = { map: 0 };
    this.isDue = true;
    this.isVisible = false;
    this.addControls(figure.querySelector(".controls"));
  }

  get kind() { return this.chart.kind; }
  get isOfLayers() { return this.kind === "layers" || this.kind === "events"; }
  get map() { return this.chart.maps?.[this.settings.map]; }

  addControls(controls) {
    this.choosers = [];
    if (this.chart.maps) {
      this.settings.map = this.firstMap();
      // One selection for each field in which the maps differ.
      this.fields = ["run", "event", "statistic", "quantity", "scope"].filter(
        (field) => new Set(this.chart.maps.map((map) => map[field])).size > 1 ||
          (field === "event" && this.kind === "events"));
      for (const field of this.fields) {
        const found = new Set(this.chart.maps.map((map) => map[field]));
        const options = field === "run" ? sortNumbers(found) : [...found];
        const labels = field === "run" ? options.map((run) => runNames[run]) : options;
        const chooser = selection(field, labels, (place) => this.choose(field, options[place]),
          options.indexOf(this.map[field]));
        this.choosers.push(() => { chooser.selectedIndex = options.indexOf(this.map[field]); });
        if (field === "statistic") {
          for (const option of chooser.options) {
            option.title = this.chart.maps.find((map) => map.statistic === option.text).meaning;
          }
        }
        controls.append(chooser);
      }
    }
    if (this.isOfLayers) {
      this.layer = selection("layer", [], (place) =>
        this.set({ layer: place ? this.map.layers[place - 1] : null }));
      controls.append(this.layer);
    }
    if (this.kind === "curves" || this.isOfLayers) {
      this.log = button("log", () => this.set({ isLog: !this.isLog }));
      this.log.ariaLabel = `${this.chart.title} on a logarithmic scale`;
      this.whole = button("full range", () => this.set({ isWhole: !this.settings.isWhole }));
      this.whole.ariaLabel = `${this.chart.title} with outliers`;
      controls.append(this.whole, this.log);
    }
    const save = button("PNG", () => this.save());
    save.ariaLabel = `save ${this.chart.title} as a PNG`;
    controls.append(save);
  }

  /** Selects a map by a field, keeping the other fields if possible. */
  choose(field, value) {
    const wanted = { ...this.map, [field]: value };
    const maps = this.chart.maps;
    let map = maps.findIndex((each) => this.fields.every((other) => each[other] === wanted[other]));
    if (map === -1) map = maps.findIndex((each) => each[field] === value);
    this.set({ map, isLog: undefined, layer: null });
  }

  /** Returns the initial map: denominators, update_to_weight, or grad_rms of an event. */
  firstMap() {
    const statistic = this.kind === "events" ? "grad_rms" : "update_to_weight";
    const first = this.chart.maps.findIndex((map) =>
      map.quantity === "denominator" || map.statistic === statistic);
    return Math.max(first, 0);
  }

  /** Whether the axis is logarithmic: as selected, otherwise as the chart defines if it has positive values. */
  get isLog() {
    const { isLog } = this.map ?? this.chart;
    if (this.settings.isLog !== undefined || !isLog) return this.settings.isLog ?? isLog;
    const arrays = this.map ? [this.map.values] : this.chart.lines?.map((line) => line.values);
    return arrays.some((each) => each && unpack(each).some((value) => value > 0));
  }

  set(settings) {
    Object.assign(this.settings, settings);
    this.refresh();
  }

  refresh() {
    this.isDue = true;
    if (this.isVisible) this.draw();
  }

  content() {
    const settings = { ...this.settings, isLog: this.log ? this.isLog : false };
    const main = DRAW_FUNCTIONS[this.kind](this.chart, settings, this.place);
    if (!this.side) return [main];
    this.side.hidden = this.layer.hidden = unpack(this.map.steps).length === 1;
    return this.side.hidden ? [main] : [main, drawLayerCurves(this.chart, settings, this.side, this.place)];
  }

  draw() {
    if (!this.isDue) return;
    this.isDue = false;
    for (const update of this.choosers) update();
    if (this.layer) {
      const options = ["largest layers", ...this.map.layers];
      this.layer.replaceChildren(...options.map((option) => new Option(option)));
      this.layer.selectedIndex = this.settings.layer ? options.indexOf(this.settings.layer) : 0;
    }
    const content = this.content();
    this.log?.setAttribute("aria-pressed", this.isLog);
    if (this.whole) {
      this.whole.hidden = !content[0].isCut && !this.settings.isWhole;
      this.whole.setAttribute("aria-pressed", Boolean(this.settings.isWhole));
    }
    content.forEach(({ data, layout }, place) => this.plot(place ? this.side : this.place, data, layout));
  }

  plot(place, data, layout) {
    const isFirst = !place.data;
    // Without it Plotly does not look for the allEnds of an axis in arrays that have not changed.
    layout.datarevision = this.revision = (this.revision ?? 0) + 1;
    Plotly.react(place, data, layout, { displayModeBar: false, responsive: true, doubleClick: false });
    if (!isFirst) return;
    place.on("plotly_relayout", (change) => this.follow(change));
    place.on("plotly_doubleclick", () => {
      if (this.hasSteps) update({ range: null });
      if (this.kind === "events") this.refresh();
    });
    if (this.isOfLayers && place === this.place) {
      place.on("plotly_click", ({ points }) => {
        const layer = this.map.layers[points[0].y];
        this.set({ layer: layer === this.settings.layer ? null : layer });
      });
    }
  }

  /** Whether the x-axis has the steps of the whole run. */
  get hasSteps() {
    const isSingle = this.map && unpack(this.map.steps).length === 1;
    return this.kind !== "eps_curve" && this.kind !== "events" && !isSingle;
  }

  /** Applies a zoom to all other charts. */
  follow(change) {
    const range = change["xaxis.range"] ?? [change["xaxis.range[0]"], change["xaxis.range[1]"]];
    if (this.hasSteps && range[0] !== undefined) update({ range: range.map(Number) });
  }

  /** Saves a picture for a paper or a slide: light theme, with title and legend. */
  save() {
    const theme = state.theme;
    root.dataset.theme = state.theme = "light";
    const [{ data, layout }] = this.content();
    const isScoped = this.chart.lines?.some((line) => line.scope !== null);
    const { map } = this;
    const parts = [
      this.chart.title, map?.event, map?.statistic ?? map?.quantity, map?.scope,
      isComparison && (map ? runNames[map.run] : isScoped && state.scope),
    ].filter(Boolean);
    const unit = map?.unit ?? this.chart.unit;
    layout.title = {
      text: escapeHtml(parts.join(", ") + (unit ? ` [${unit}]` : "")), x: 0.02, font: { size: 20 },
    };
    layout.font.size = 16;
    layout.margin = { l: 12, r: 12, t: data.length > 1 ? 84 : 52, b: 12 };
    layout.showlegend = data.length > 1;
    layout.legend = { orientation: "h", x: 1, xanchor: "right", y: 1.02, yanchor: "bottom" };
    for (const trace of data) if (trace.line) trace.line.width += 0.8;
    root.dataset.theme = state.theme = theme;
    const name = parts.join("_").replaceAll(/[^\w.=-]+/g, "_").replaceAll(/^_+|_+$/g, "");
    return Plotly.downloadImage({ data, layout }, {
      format: "png", width: 900, height: this.isOfLayers ? Math.max(500, this.place.clientHeight) : 500,
      scale: 3, filename: `adam_${name}`,
    });
  }
}

function button(text, onSelect) {
  const element = document.createElement("button");
  element.type = "button";
  element.textContent = text;
  element.addEventListener("click", onSelect);
  return element;
}

function selection(label, options, onSelect, first = 0) {
  const element = document.createElement("select");
  element.ariaLabel = label;
  element.append(...options.map((option) => new Option(option)));
  element.selectedIndex = first;
  element.addEventListener("change", () => onSelect(element.selectedIndex));
  return element;
}

// ---- The page

const getElement = (id) => document.getElementById(id);
const panels = [...document.querySelectorAll(".panel")].map((figure) => new Panel(figure));
const panelOf = (chart) => panels.find((panel) => panel.chart.id === chart);

/** Changes the state of the page, and redraws the visible charts. */
function update(change) {
  Object.assign(state, change);
  root.dataset.theme = state.theme;
  const [first, last] = state.range ?? allEnds();
  getElement("unit").textContent = isTime() ? `time (${timeUnit})` : "steps";
  getElement("first-step").value = Math.ceil(first);
  getElement("last-step").value = Math.floor(last);
  for (const each of legend.children) {
    each.setAttribute("aria-pressed", !state.hidden.includes(each.name));
    each.style.setProperty("--mark", each.color());
  }
  for (const each of document.querySelectorAll("[data-run]")) {
    each.style.setProperty("--mark", colorOf({ run: Number(each.dataset.run) }));
  }
  for (const panel of panels) panel.refresh();
  saveState();
}

/** While a run is training, the page reloads itself and restores its state. */
const STORAGE_KEY = "adam_report";
function saveState() {
  if (report.refresh) sessionStorage.setItem(STORAGE_KEY, JSON.stringify({ ...state, search: search.value }));
}
function restoreState() {
  if (!report.refresh) return {};
  setTimeout(() => location.reload(), 1000 * report.refresh);
  return JSON.parse(sessionStorage.getItem(STORAGE_KEY) ?? "{}");
}

const inputs = ["first-step", "last-step"].map(getElement);
for (const input of inputs) {
  input.addEventListener("change", () => {
    let range = inputs.map((each) => Number(each.value));
    // If the ends cross, the other end is reset.
    const all = allEnds();
    if (range[0] >= range[1]) range = input === inputs[0] ? [range[0], all[1]] : [all[0], range[1]];
    update({ range: range[0] < range[1] ? range : null });
  });
}
getElement("all-steps").addEventListener("click", () => update({ range: null }));
getElement("theme").addEventListener("click", () =>
  update({ theme: state.theme === "light" ? "dark" : "light" }));
getElement("smoothing").addEventListener("input", (event) => update({ smoothing: Number(event.target.value) }));

const legend = getElement("legend");
names.forEach((name, place) => {
  const mark = button(name, () => update({
    hidden: state.hidden.includes(name)
      ? state.hidden.filter((each) => each !== name) : [...state.hidden, name],
  }));
  mark.name = name;
  mark.color = () => COLORS[state.theme][place % COLORS[state.theme].length];
  legend.append(mark);
});

if (isComparison && scopes.length > 1) {
  getElement("scope").append(...scopes.map((each) => new Option(each)));
  getElement("scope").addEventListener("change", () => update({ scope: getElement("scope").value }));
  getElement("scope-choice").hidden = false;
}
if (report.runs.every((run) => run.times)) {
  getElement("axis").addEventListener("change", () => update({ axis: getElement("axis").value, range: null }));
  getElement("axis-choice").hidden = false;
}

/** Shows only charts with every word in the title or explanation. */
const search = getElement("search");
function filterCharts() {
  const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
  for (const { figure } of panels) {
    const text = [figure.dataset.chart, figure.querySelector("h3").textContent,
      figure.querySelector(".meaning").textContent].join(" ").toLowerCase();
    figure.hidden = !words.every((word) => text.includes(word));
  }
  for (const part of document.querySelectorAll("section.charts, details.more")) {
    const isFound = part.querySelector("figure:not([hidden])") !== null;
    part.hidden = words.length > 0 && !isFound;
    if (!part.matches("details")) continue;
    // A search opens sections with matches; afterwards they are closed again.
    if (words.length) {
      part.wasOpen ??= part.open;
      part.open = isFound;
    } else {
      part.open = part.wasOpen ?? part.open;
      part.wasOpen = undefined;
    }
  }
  getElement("no-chart").hidden = !words.length || panels.some((panel) => !panel.figure.hidden);
  saveState();
}
search.addEventListener("input", filterCharts);

/** Scrolls from a finding to its chart. */
function revealChart({ chart, statistic, place, scope }) {
  const panel = panelOf(chart);
  if (search.value) { search.value = ""; filterCharts(); }
  panel.figure.closest("details")?.setAttribute("open", "");
  if (panel.isOfLayers) {
    const maps = panel.chart.maps.filter((map) => map.statistic === statistic);
    const ofRun = maps.filter((map) => map.run === Number(place));
    const map = ofRun.find((each) => each.layers.includes(scope)) ?? ofRun[0] ?? maps[0];
    const layer = map.layers.includes(scope) ? scope : null;
    panel.set({ map: panel.chart.maps.indexOf(map), isLog: undefined, layer });
  }
  const shown = scope || "model";
  if (isComparison && scopes.includes(shown)) {
    getElement("scope").value = shown;
    update({ scope: shown });
  }
  for (const each of document.querySelectorAll(".is-shown")) each.classList.remove("is-shown");
  panel.figure.classList.add("is-shown");
  panel.figure.scrollIntoView({ block: "center" });
  panel.figure.focus({ preventScroll: true });
}
for (const link of document.querySelectorAll("a[data-chart]")) {
  link.addEventListener("click", (event) => {
    event.preventDefault();
    revealChart(link.dataset);
  });
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
  if (event.key === "/" && !event.target.matches("input, select")) {
    event.preventDefault();
    search.focus();
  }
  if (event.key !== "Escape") return;
  for (const open of document.querySelectorAll(".is-open")) open.classList.remove("is-open");
  for (const caption of document.querySelectorAll("figcaption:hover, figcaption:focus-within")) {
    caption.classList.add("is-dismissed");
  }
});

// Keep the focused control below the sticky toolbar.
new ResizeObserver(([{ target }]) => {
  const isSticky = getComputedStyle(target).position === "sticky";
  root.style.scrollPaddingTop = isSticky ? `${target.offsetHeight + 8}px` : "";
}).observe(document.querySelector(".toolbar"));

// Charts are drawn when they come into view.
const visibility = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    const panel = panels.find((each) => each.place === entry.target);
    panel.isVisible = entry.isIntersecting;
    if (panel.isVisible) panel.draw();
  }
}, { rootMargin: "300px" });
for (const panel of panels) visibility.observe(panel.place);

const restored = restoreState();
search.value = restored.search ?? "";
delete restored.search;
getElement("axis").value = restored.axis ?? "step";
getElement("smoothing").value = restored.smoothing ?? 0;
update({ theme: matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light", ...restored });
if (search.value) filterCharts();
