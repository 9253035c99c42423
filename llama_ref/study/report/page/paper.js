// On paper: light colours, the whole of a strip, and of a grid as many columns as there is room for.

/**
 * `height`: in pixels that every usual page has; its width is main's, in report.css. `density`: dots for a pixel; with more,
 * some browsers print a canvas of more than 2,048 smaller than it is.
 */
const paper = { on: false, height: 900, density: 2 };

function startPaper() {
  const root = document.documentElement;
  const before = { theme: undefined, scrolled: [] };
  const turn = (on, theme) => {
    paper.on = on;
    root.classList.toggle("paper", on);
    if (theme) root.dataset.theme = theme;
    else delete root.dataset.theme;
    for (const draw of drawn) draw(); // for the width that there is now
    recolour();
  };
  addEventListener("beforeprint", () => {
    if (paper.on) return;
    card.hide();
    before.theme = root.dataset.theme;
    before.scrolled = [...document.querySelectorAll(".grid, .strip")].map((box) => [box, box.scrollLeft, box.scrollTop]);
    turn(true, "light");
  });
  addEventListener("afterprint", () => {
    if (!paper.on) return;
    turn(false, before.theme);
    for (const [box, left, top] of before.scrolled) box.scrollTo(left, top);
  });
}
