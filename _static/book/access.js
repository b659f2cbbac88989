// What the theme leaves wrong for screen readers. The words that can be read on a button have to be in its label: "Search"
// has its keys beside it, and the three icons of the colour mode bring words of their own. And a list has to hold items.
(function () {
  function mend() {
    for (const title of document.querySelectorAll(".theme-switch-button svg title")) {
      title.parentElement.setAttribute("aria-hidden", "true"); // the button says what it does
      title.remove();
    }
    for (const button of document.querySelectorAll(".search-button__button")) button.removeAttribute("aria-label");
    document.querySelectorAll(".citation-list[role=list] > *").forEach((item) => item.setAttribute("role", "listitem"));
  }
  document.addEventListener("DOMContentLoaded", function () {
    mend();
    new MutationObserver(mend).observe(document.body, { childList: true, subtree: true });
  });
})();

// The widget library draws a slider's handle without a name for screen readers: give it the label that stands before it.
(function () {
  function name(handle) {
    const slider = handle.closest(".widget-inline-hbox, .jupyter-widget-inline-hbox, .widget-hbox");
    const label = slider && slider.querySelector(".widget-label, .jupyter-widget-label");
    handle.setAttribute("aria-label", (label && label.textContent.trim()) || "slider");
    const readout = slider && slider.querySelector(".widget-readout, .jupyter-widget-readout");
    if (readout) {
      const tell = () => handle.setAttribute("aria-valuetext", readout.textContent.trim());
      tell();
      new MutationObserver(tell).observe(readout, { childList: true, characterData: true, subtree: true });
    }
  }
  function nameAll() {
    document.querySelectorAll('[role="slider"]:not([aria-label])').forEach(name);
  }
  document.addEventListener("DOMContentLoaded", function () {
    nameAll();
    new MutationObserver(nameAll).observe(document.body, { childList: true, subtree: true });
  });
})();
