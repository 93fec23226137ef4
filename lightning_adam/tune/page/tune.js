"use strict";

const root = document.documentElement;
const setTheme = (theme) => { root.dataset.theme = theme; };
setTheme(matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
document.getElementById("theme").addEventListener("click", () =>
  setTheme(root.dataset.theme === "light" ? "dark" : "light"));

// ---- What to type

const line = document.getElementById("line");
async function copy() {
  try {
    await navigator.clipboard.writeText(line.textContent);
  } catch {
    // A page that came by plain http has no clipboard of its own.
    getSelection().selectAllChildren(line);
    document.execCommand("copy");
  }
  document.getElementById("copied").textContent = "copied";
}
document.getElementById("copy")?.addEventListener("click", copy);

// ---- What a point says

const told = document.getElementById("told");
const words = new Map();
for (const mark of document.querySelectorAll(".chart .mark")) {
  // Without a script the browser shows the title itself.
  const title = mark.querySelector("title");
  words.set(mark, title.textContent);
  title.remove();
  mark.addEventListener("pointerenter", () => show(mark));
  mark.addEventListener("pointerleave", () => { told.hidden = true; });
  mark.addEventListener("click", () => find(mark.dataset.trial));
}

function show(mark) {
  told.textContent = words.get(mark);
  told.hidden = false;
  const box = mark.getBoundingClientRect();
  const left = Math.min(Math.max(box.left + box.width / 2 - told.offsetWidth / 2, 6),
    innerWidth - told.offsetWidth - 6);
  const above = box.top - told.offsetHeight - 8;
  told.style.left = `${left}px`;
  told.style.top = `${above > 6 ? above : box.bottom + 8}px`;
}

/** Singles out a trial, in the pictures and in the table of all. */
function find(trial) {
  for (const each of document.querySelectorAll("[data-trial]")) {
    each.classList.toggle("is-found", each.dataset.trial === trial);
  }
  document.querySelector("tr.is-found").scrollIntoView({ block: "center" });
}
addEventListener("keydown", (event) => { if (event.key === "Escape") told.hidden = true; });
addEventListener("scroll", () => { told.hidden = true; }, { capture: true, passive: true });
