// What a page needs beside Gradio's own: keys, pasted and dropped pictures, the tab's title, the phone's screen.
(() => {
  const find = (selector) => document.querySelector(selector);
  const title = document.title || "DeciDiffusion on OpenVINO";

  // Enter generates from the prompts and the seed, where Shift+Enter begins a new line, and Ctrl+Enter from every field.
  document.addEventListener("keydown", (event) => {
    const inPrompt = event.target.closest?.("#prompt, #negative, #seed") && !event.shiftKey;
    if (event.key === "Enter" && !event.isComposing && (event.ctrlKey || event.metaKey || inPrompt)) {
      event.preventDefault();
      event.stopPropagation();
      find("#generate")?.click();
    }
  }, true);

  // While one file is being read, Gradio has no field for the next; the latest of those that wait is taken.
  let waits = 0;
  const takeIn = (file, tries = 150) => {
    clearTimeout(waits);
    const input = find("#incoming input[type=file]");
    if (!input) {
      if (tries) waits = setTimeout(takeIn, 200, file, tries - 1);
      return;
    }
    const files = new DataTransfer();
    files.items.add(file);
    input.files = files.files;
    input.dispatchEvent(new Event("change", { bubbles: true }));
  };
  const pictureOf = (transfer) => [...(transfer?.files ?? [])].find((file) => file.type.startsWith("image/"));

  // A picture that is pasted anywhere, or dropped where no field takes it.
  document.addEventListener("paste", (event) => {
    const file = pictureOf(event.clipboardData);
    if (file) {
      event.preventDefault();
      event.stopPropagation();
      takeIn(file);
    }
  }, true);
  document.addEventListener("dragover", (event) => event.preventDefault());
  document.addEventListener("drop", (event) => {
    if (event.target.closest?.("#editor")) return;
    event.preventDefault();
    const file = pictureOf(event.dataTransfer);
    if (file) takeIn(file);
  });

  // What goes on, in the tab's title; and on a phone the result comes into view when it starts.
  let last = "", running = false;
  const look = () => {
    const text = find("#status [role=status]")?.textContent ?? "";
    if (text === last) return;
    last = text;
    const now = /^(Step|Reading|Waiting|Decoding)/.test(text);
    document.title = now ? `${text} – ${title}` : title;
    if (now && !running && window.innerWidth <= 700) find("#stage")?.scrollIntoView({ behavior: "smooth" });
    running = now;
  };
  new MutationObserver(look).observe(document, { subtree: true, childList: true, characterData: true });

  // What was typed is still there after a reload, also when the server was started anew meanwhile.
  const fields = ["#prompt textarea", "#negative textarea"];
  document.addEventListener("input", (event) => {
    const field = fields.find((selector) => event.target.matches?.(selector));
    if (field) localStorage.setItem(`ov_decidiffusion ${field}`, event.target.value);
  });
  const restore = setInterval(() => {
    const ready = fields.every((selector) => find(selector));
    if (!ready) return;
    clearInterval(restore);
    for (const selector of fields) {
      const kept = localStorage.getItem(`ov_decidiffusion ${selector}`), field = find(selector);
      if (kept && !field.value) {
        field.value = kept;
        field.dispatchEvent(new Event("input", { bubbles: true }));
      }
    }
  }, 200);
})();
