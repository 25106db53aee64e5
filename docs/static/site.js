// Browsers do not let a page on disk read another file. So, on disk, the search gets the texts of the pages from a
// script, and the list of versions is this version alone. With a server this part does nothing.
(() => {
  if (location.protocol !== "file:") return;
  const root = decodeURI(new URL(document.documentElement.dataset.content_root, location.href).href);
  let texts;
  const loadTexts = () =>
    new Promise((resolve) => {
      const script = document.createElement("script");
      script.src = `${root}_static/excerpts.js`;
      script.onload = script.onerror = () => resolve(window.siteTexts || {});
      document.head.append(script);
    });
  const answer = async (path) => {
    if (path.endsWith("versions.json")) {
      const version = DOCUMENTATION_OPTIONS.VERSION;
      return JSON.stringify([{ name: version, version, url: root }]);
    }
    texts ||= loadTexts();
    const text = (await texts)[path.replace(/\.html$/, "")];
    return text ? `<div role="main">${text}</div>` : "";
  };
  window.fetch = async (address) => {
    const url = decodeURI(new URL(address, location.href).href).replace(/[?#].*/, "");
    return new Response(await answer(url.replace(root, "")));
  };
})();

// Names that screen readers say: what stands on a button, and what an arrow of the sidebar opens.
document.addEventListener("DOMContentLoaded", () => {
  for (const button of document.querySelectorAll(".search-button-field")) {
    button.setAttribute("aria-label", button.textContent.replace(/\s+/g, " ").trim());
  }
  for (const button of document.querySelectorAll(".version-switcher__button")) {
    button.removeAttribute("aria-label"); // its text is the version
  }
  for (const summary of document.querySelectorAll(".has-children > details > summary")) {
    const page = summary.closest("li").querySelector("a");
    summary.setAttribute("aria-label", `Pages below ${page.textContent.trim()}`);
  }
});
