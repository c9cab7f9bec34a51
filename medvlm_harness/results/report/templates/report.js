"use strict";
(() => {
  const every = (selector, root = document) => [...root.querySelectorAll(selector)];
  const value = (row, column) => {
    const cell = row.cells[column];
    return cell.classList.contains("number") ? parseFloat(cell.dataset.sort) : cell.textContent.trim().toLowerCase();
  };
  const compare = (a, b, sign) => {
    const missing = (one) => one === "" || Number.isNaN(one);
    if (missing(a) || missing(b)) return missing(a) - missing(b); // what is not known is last both ways
    if (typeof a === "number" && typeof b === "number") return sign * (a - b);
    return sign * String(a).localeCompare(String(b), "en", { numeric: true });
  };

  every("th button").forEach((button) => {
    button.addEventListener("click", () => {
      const head = button.closest("th");
      const table = head.closest("table");
      const first = button.dataset.better === "higher" ? "descending" : "ascending";
      const other = first === "ascending" ? "descending" : "ascending";
      const order = head.getAttribute("aria-sort") === first ? other : first;
      every("th[aria-sort]", table).forEach((one) => one.setAttribute("aria-sort", "none"));
      head.setAttribute("aria-sort", order);
      const sign = order === "ascending" ? 1 : -1;
      const column = head.cellIndex;
      const rows = [...table.tBodies[0].rows];
      rows.sort((a, b) => compare(value(a, column), value(b, column), sign));
      table.tBodies[0].append(...rows);
    });
  });

  const hidden = new Set();
  const show = (table) => {
    const field = document.querySelector(`input[data-filter="${table.id}"]`);
    const wanted = field ? field.value.trim().toLowerCase() : "";
    const rows = [...table.tBodies[0].rows];
    rows.forEach((row) => {
      row.hidden = hidden.has(row.dataset.run) || !row.textContent.toLowerCase().includes(wanted);
    });
    every("th[data-run], td[data-run]", table).forEach((cell) => { cell.hidden = hidden.has(cell.dataset.run); });
    const output = document.querySelector(`output[data-count="${table.id}"]`);
    const seen = rows.filter((row) => !row.hidden).length;
    if (output) output.textContent = seen === rows.length ? "" : `${seen} of ${rows.length} rows`;
  };
  every("input[data-filter]").forEach((field) => {
    field.addEventListener("input", () => show(document.getElementById(field.dataset.filter)));
  });
  every(".runs input").forEach((box) => {
    box.addEventListener("change", () => {
      if (box.checked) hidden.delete(box.value); else hidden.add(box.value);
      every("table").forEach(show);
    });
  });

  const links = new Map(every("nav a").map((link) => [link.hash.slice(1), link]));
  const seen = new IntersectionObserver((entries) => {
    entries.filter((one) => one.isIntersecting).forEach((one) => {
      links.forEach((link, name) => {
        if (name === one.target.id) link.setAttribute("aria-current", "true"); else link.removeAttribute("aria-current");
      });
    });
  }, { rootMargin: "0px 0px -75% 0px" });
  every("main > section").forEach((section) => seen.observe(section));
})();
