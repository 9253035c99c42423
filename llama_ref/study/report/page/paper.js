// On paper: light colours, whole strips, and as many columns of a grid as fit.

/**
 * `height`: pixels that fit on every common paper size; the width is main's, in report.css. `density`: dots per pixel; with
 * more, some browsers shrink a printed canvas of more than 2,048 dots.
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
    for (const draw of drawn) draw(); // for the new width
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
