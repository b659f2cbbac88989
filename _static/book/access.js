// What the theme leaves wrong for screen readers. A button's label has to hold the words that can be read on it ("Search"
// with its keys), and a list has to hold items.
(function () {
  document.addEventListener("DOMContentLoaded", function () {
    for (const button of document.querySelectorAll("button[aria-label]")) {
      const words = button.textContent.trim().replace(/\s+/g, " ");
      const label = button.getAttribute("aria-label");
      if (words && !label.toLowerCase().includes(words.toLowerCase())) {
        button.setAttribute("aria-label", words.toLowerCase().includes(label.toLowerCase()) ? words : `${label}: ${words}`);
      }
    }
    document.querySelectorAll(".citation-list[role=list] > *").forEach((item) => item.setAttribute("role", "listitem"));
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
