// Grids of shaded cells on a canvas of the visible size: a grid of any size scrolls smoothly and needs one element.

const HEADER_HEIGHT = 22;
const SMALLEST_WITH_TEXT = 34; // pixels of a cell's width
const NARROWEST_ON_PAPER = 44; // pixels of a cell's width, if cells have text
const EDGE = 2; // pixels of both borders

class Grid {
  /**
   * `strength(row, column)` is how strongly a cell is shaded, from -1 to 1, null where there is no number, undefined where
   * there is no cell. `text` is the cell's text, `describe` the card's content, `pick` a click's action, `marked` which row
   * and column are selected. `size(space)` gives a cell's [width, height] in that many pixels.
   */
  constructor(element, { rows, columns, rowName, columnName, strength, text = null, describe, pick, marked, size, label }) {
    Object.assign(this, { element, rows, columns, rowName, columnName, strength, text, describe, pick, marked, size });
    this.canvas = make("canvas");
    this.room = make("div", {}, this.canvas);
    this.context = this.canvas.getContext("2d");
    this.cut = 0; // number of first columns that do not fit on paper
    this.cursor = null; // {row, column} under the pointer, or chosen by keys
    element.tabIndex = 0;
    element.setAttribute("role", "application");
    element.setAttribute("aria-label", `${label}; arrow keys, Home, End, Page Up and Page Down move, Enter selects`);
    element.append(this.room);
    this.listen();
    drawnToWidth(element.parentElement, () => this.layOut());
  }

  // ---- size

  layOut() {
    if (!this.element.clientWidth) return;
    this.context.font = `11.5px ${getComputedStyle(this.element).fontFamily}`;
    const names = range(this.rows).map((row) => this.context.measureText(this.rowName(row)).width);
    this.gutter = Math.ceil(names.reduce((a, b) => Math.max(a, b))) + 12;
    const space = this.element.parentElement.clientWidth - this.gutter - EDGE - 1;
    [this.cellWidth, this.cellHeight] = this.size(space);
    const columns = paper.on ? this.fitPaper(space) : this.columns;
    const width = this.gutter + columns * this.cellWidth + 1;
    const height = HEADER_HEIGHT + this.rows * this.cellHeight + 1;
    this.room.style.width = `${width}px`;
    this.room.style.height = `${height}px`;
    this.element.style.width = `${width + EDGE}px`; // 100% at most
    const scrollbar = this.element.offsetHeight - this.element.clientHeight - EDGE;
    this.element.style.height = `${height + EDGE + scrollbar}px`; // most of the window's height at most
    this.paint();
  }

  /** Narrow the cells to fit on paper; returns the number of columns that fit: the last ones, if not all do. */
  fitPaper(space) {
    this.cellWidth = clamp(Math.floor(space / this.columns), Math.min(this.cellWidth, NARROWEST_ON_PAPER), this.cellWidth);
    this.cellHeight = Math.min(this.cellHeight, (paper.height - HEADER_HEIGHT) / this.rows);
    const columns = Math.min(this.columns, Math.floor(space / this.cellWidth + 1e-6));
    this.cut = this.columns - columns;
    return columns;
  }

  /** The scroll position; paper shows the end. */
  get scroll() {
    const { scrollLeft: left, scrollTop: top } = this.element;
    return paper.on ? { left: this.cut * this.cellWidth, top: 0 } : { left, top };
  }

  /** The visible cells, ends excluded. */
  view() {
    const { clientWidth, clientHeight } = this.element;
    const { left: scrollLeft, top: scrollTop } = this.scroll;
    return {
      left: Math.floor(scrollLeft / this.cellWidth),
      right: Math.min(this.columns, Math.ceil((scrollLeft + clientWidth - this.gutter) / this.cellWidth)),
      top: Math.floor(scrollTop / this.cellHeight),
      bottom: Math.min(this.rows, Math.ceil((scrollTop + clientHeight - HEADER_HEIGHT) / this.cellHeight)),
    };
  }

  x = (column) => this.gutter + column * this.cellWidth - this.scroll.left;
  y = (row) => HEADER_HEIGHT + row * this.cellHeight - this.scroll.top;

  // ---- painting

  paint(stale = true) {
    if (!this.cellWidth) {
      this.layOut(); // which paints
      return;
    }
    if (stale && this.cursor) this.cursor = { ...this.cursor }; // a new object makes the card refresh its content
    const { clientWidth: width, clientHeight: height } = this.element;
    const density = paper.on ? paper.density : devicePixelRatio || 1;
    this.canvas.width = width * density;
    this.canvas.height = height * density;
    this.canvas.style.width = `${width}px`;
    this.canvas.style.height = `${height}px`;
    this.context.scale(density, density);
    const view = this.view();
    this.paintCells(view, density, stale);
    if (this.text && this.cellWidth >= SMALLEST_WITH_TEXT) this.paintTexts(view);
    this.paintMarks(view);
    this.paintNames(view, width, height);
  }

  /** The cells' image, enlarged; it is cached while the same cells are visible and none is `stale`. */
  paintCells(view, density, stale) {
    const size = [(view.right - view.left) * this.cellWidth, (view.bottom - view.top) * this.cellHeight];
    const key = JSON.stringify([view, size, density]);
    if (stale || key !== this.imageKey) [this.image, this.imageKey] = [this.makeImage(view, density), key];
    this.context.imageSmoothingEnabled = false;
    if (this.image) this.context.drawImage(this.image, this.x(view.left), this.y(view.top), ...size);
  }

  /** A pixel for each cell; where cells are smaller than the screen's pixels, one for the strongest of several. */
  makeImage({ left, right, top, bottom }, density) {
    const columns = pooled(left, right, this.cellWidth * density);
    const rows = pooled(top, bottom, this.cellHeight * density);
    if (!columns.length || !rows.length) return null;
    const image = new ImageData(columns.length, rows.length);
    const colours = new Uint32Array(image.data.buffer);
    const missing = asPixel(colour("missing"));
    for (const [y, row] of rows.entries()) {
      for (const [x, column] of columns.entries()) {
        const strength = this.strongest(row, column);
        if (strength === undefined) continue; // transparent: the panel shows
        colours[y * columns.length + x] = strength === null ? missing : pixels[shadeIndex(strength)];
      }
    }
    const canvas = new OffscreenCanvas(columns.length, rows.length);
    canvas.getContext("2d").putImageData(image, 0, 0);
    return canvas;
  }

  /** The strength furthest from 0 of the cells in a range, ends excluded. */
  strongest([top, bottom], [left, right]) {
    let best = this.strength(top, left);
    if (bottom - top === 1 && right - left === 1) return best;
    for (let row = top; row < bottom; row++) {
      for (let column = left; column < right; column++) {
        const strength = this.strength(row, column);
        if (best === undefined || Math.abs(strength) > Math.abs(best)) best = strength;
      }
    }
    return best;
  }

  paintTexts(view) {
    const context = this.context;
    const mono = getComputedStyle(document.documentElement).getPropertyValue("--mono");
    context.font = `${Math.min(11.5, this.cellHeight - 1)}px ${mono}`;
    context.textBaseline = "middle";
    context.textAlign = "left";
    for (let row = view.top; row < view.bottom; row++) {
      for (let column = view.left; column < view.right; column++) {
        const strength = this.strength(row, column);
        context.fillStyle = inkOn(strength === null ? colour("missing") : shade(strength));
        const text = fitted(context, this.text(row, column), this.cellWidth - 8);
        context.fillText(text, this.x(column) + 4, this.y(row) + this.cellHeight / 2 + 0.5);
      }
    }
  }

  /** The selected row and column, and the cell under the pointer. */
  paintMarks(view) {
    const { row = null, column = null } = this.marked();
    this.context.strokeStyle = css(colour("accent"));
    this.context.lineWidth = 2;
    const [width, height] = [this.cellWidth, this.cellHeight];
    const [across, down] = [(view.right - view.left) * width, (view.bottom - view.top) * height];
    if (row !== null && column !== null) this.context.strokeRect(this.x(column), this.y(row), width, height);
    else if (column !== null) this.context.strokeRect(this.x(column), this.y(view.top), width, down);
    else if (row !== null) this.context.strokeRect(this.x(view.left), this.y(row), across, height);
    if (!this.cursor) return;
    this.context.strokeStyle = css(colour("ink"));
    this.context.lineWidth = 1.5;
    this.context.strokeRect(this.x(this.cursor.column), this.y(this.cursor.row), width, height);
  }

  /** Names of rows and columns, drawn over the scrolled cells. */
  paintNames(view, width, height) {
    const context = this.context;
    context.font = `11.5px ${getComputedStyle(this.element).fontFamily}`;
    context.textBaseline = "middle";
    context.fillStyle = css(colour("panel"));
    context.fillRect(0, 0, width, HEADER_HEIGHT);
    context.fillRect(0, 0, this.gutter, height);
    const { row = null, column = null } = this.marked();
    context.textAlign = "right";
    const everyRow = spaced(13 / this.cellHeight);
    for (let r = Math.ceil(view.top / everyRow) * everyRow; r < view.bottom; r += everyRow) {
      const y = this.y(r) + (everyRow === 1 ? this.cellHeight / 2 : 0);
      if (y < HEADER_HEIGHT) continue;
      context.fillStyle = css(colour(r === row ? "accent" : "muted"));
      context.fillText(this.rowName(r), this.gutter - 7, y);
    }
    this.paintColumnNames(view, width, column);
  }

  paintColumnNames(view, width, selected) {
    const context = this.context;
    const named = this.cellWidth >= SMALLEST_WITH_TEXT;
    const every = named ? 1 : spaced(30 / this.cellWidth);
    context.textAlign = named ? "left" : "center";
    context.save();
    context.beginPath();
    context.rect(this.gutter, 0, width, HEADER_HEIGHT);
    context.clip();
    for (let column = Math.floor(view.left / every) * every; column < view.right; column += every) {
      context.fillStyle = css(colour(column === selected ? "accent" : "muted"));
      const name = named ? fitted(context, this.columnName(column), this.cellWidth - 6) : String(column);
      const middle = Math.max(this.x(column) + this.cellWidth / 2, this.gutter + context.measureText(name).width / 2 + 1);
      context.fillText(name, named ? this.x(column) + 4 : middle, HEADER_HEIGHT / 2 + 1);
    }
    context.restore();
  }

  // ---- pointer and keys

  listen() {
    const element = this.element;
    element.addEventListener("scroll", () => this.scrolled(), { passive: true });
    element.addEventListener("pointermove", (event) => this.moveTo(this.cellAt(event), event));
    element.addEventListener("pointerleave", () => this.leave());
    element.addEventListener("blur", () => this.leave());
    element.addEventListener("click", (event) => {
      const cell = this.cellAt(event);
      if (cell) this.pick(cell.row, cell.column);
    });
    element.addEventListener("keydown", (event) => this.key(event));
  }

  /** On scrolling, the cell under the pointer changes, but a cell chosen by keys keeps its card. */
  scrolled() {
    if (this.byKeys && this.cursor) this.moveTo(this.cursor);
    else card.hide();
    requestAnimationFrame(() => this.paint(false));
  }

  cellAt({ clientX, clientY }) {
    const box = this.element.getBoundingClientRect();
    const [x, y] = [clientX - box.left - this.element.clientLeft, clientY - box.top - this.element.clientTop];
    if (x < this.gutter || y < HEADER_HEIGHT || x >= this.element.clientWidth || y >= this.element.clientHeight) return null;
    const column = Math.floor((x - this.gutter + this.element.scrollLeft) / this.cellWidth);
    const row = Math.floor((y - HEADER_HEIGHT + this.element.scrollTop) / this.cellHeight);
    return column < this.columns && row < this.rows && this.strength(row, column) !== undefined ? { row, column } : null;
  }

  /** Show a cell's card at the pointer, or at the cell itself. */
  moveTo(cell, pointer = null) {
    if (!cell) {
      this.leave();
      return;
    }
    const moved = !this.cursor || cell.row !== this.cursor.row || cell.column !== this.cursor.column;
    this.byKeys = !pointer;
    if (moved) {
      this.cursor = cell;
      this.paint(false);
    }
    const box = this.element.getBoundingClientRect();
    const top = pointer ? pointer.clientY : box.top + this.y(cell.row);
    const left = pointer ? pointer.clientX + 12 : box.left + this.x(cell.column);
    const bottom = pointer ? top : top + this.cellHeight;
    card.show(this.cursor, () => this.describe(cell.row, cell.column), { left, top, bottom });
  }

  leave() {
    if (!this.cursor) return;
    this.cursor = null;
    card.hide();
    this.paint(false);
  }

  key(event) {
    const from = this.cursor ?? { row: this.marked().row ?? this.rows - 1, column: this.marked().column ?? 0 };
    const to = this.keyed(event, from);
    if (to) {
      event.preventDefault();
      this.reveal(to);
      this.moveTo(to);
    } else if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      this.pick(from.row, from.column);
    }
  }

  /** Where a key moves: Page Up and Down along the row, with Shift along the column; Ctrl+Home and Ctrl+End to a corner. */
  keyed({ key, ctrlKey, shiftKey }, from) {
    const along = { ArrowUp: "ArrowLeft", ArrowDown: "ArrowRight" }[key] ?? (shiftKey && key.startsWith("Page") ? key : null);
    const row = along || (ctrlKey && ["Home", "End"].includes(key)) ? keyedTo(along ?? key, from.row, this.rows) : from.row;
    let column = along ? from.column : keyedTo(key, from.column, this.columns);
    if (column === null) return null;
    while (column > 0 && this.strength(row, column) === undefined) column--; // the last cell of the row
    return { row, column };
  }

  /** Scroll until a cell is visible, or only its row or column if the other is not given. */
  reveal({ row = null, column = null }) {
    const { scrollLeft, scrollTop, clientWidth, clientHeight } = this.element;
    const into = (scroll, start, size, room) => clamp(scroll, start + size - room, start);
    if (column !== null) {
      this.element.scrollLeft = into(scrollLeft, column * this.cellWidth, this.cellWidth, clientWidth - this.gutter);
    }
    if (row !== null) {
      this.element.scrollTop = into(scrollTop, row * this.cellHeight, this.cellHeight, clientHeight - HEADER_HEIGHT);
    }
  }
}

/** Group the cells from `first` to `last` so that each group has at least a pixel of the screen: [[first, end], …]. */
function pooled(first, last, size) {
  const n = Math.ceil((last - first) * Math.min(1, size));
  const edge = (i) => first + Math.floor((i * (last - first)) / n);
  return range(Math.max(0, n)).map((i) => [edge(i), edge(i + 1)]);
}

/** The next round number: the step between names, if not all fit. */
const spaced = (least) => [1, 2, 5, 10, 20, 50, 100, 200, 500].find((n) => n >= least) ?? 1000;

/** Cut a text to the available width. */
function fitted(context, text, room) {
  if (context.measureText(text).width <= room) return text;
  const letters = [...text];
  while (letters.length && context.measureText(`${letters.join("")}…`).width > room) letters.pop();
  return `${letters.join("")}…`;
}
