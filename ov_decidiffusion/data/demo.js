// What the page needs besides Gradio: keys, pasted and dropped pictures, known words, the tab's title, light and dark.
(() => {
  const find = (selector) => document.querySelector(selector);
  const title = document.title || "DeciDiffusion on OpenVINO";
  const isShown = (element) => element && element.getClientRects().length > 0;
  const setText = (field, text) => {
    field.value = text;
    field.dispatchEvent(new Event("input", { bubbles: true }));
  };

  // Enter generates, or compares if the focus is in that panel; Shift+Enter begins a new line; Escape stops.
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && isShown(find("#stop"))) find("#stop").click();
    const inPrompt = event.target.closest?.("#prompt, #negative, #seed, #size") && !event.shiftKey;
    const inComparison = event.target.closest?.("#comparison input");
    const asks = event.ctrlKey || event.metaKey || inPrompt || inComparison;
    if (event.key === "Enter" && !event.isComposing && asks) {
      if (!(event.ctrlKey || event.metaKey) && event.target.closest?.("#size")) return;
      event.preventDefault();
      event.stopPropagation();
      find(event.target.closest?.("#comparison") ? "#compare" : "#generate")?.click();
    }
  }, true);

  // While a file is being read, Gradio has no input for the next one; of several waiting files, the latest is taken.
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

  // Take pictures that are pasted anywhere, or dropped outside the editor.
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

  // Without a camera, say so instead of opening an empty camera view.
  document.addEventListener("click", async (event) => {
    const button = event.target.closest?.("#editor button");
    if (!button || !/cam/i.test(button.ariaLabel ?? button.title ?? "") || button.dataset.checked) return;
    event.preventDefault();
    event.stopPropagation();
    const devices = await navigator.mediaDevices?.enumerateDevices().catch(() => []) ?? [];
    if (devices.some((one) => one.kind === "videoinput")) {
      button.dataset.checked = "yes";
      button.click();
    } else {
      find("#status [role=status]").textContent = "There is no camera here: choose or paste a picture instead.";
    }
  }, true);

  // Light or dark, as the visitor chose last, otherwise as the system is set.
  const isDark = () => document.body.classList.contains("dark");
  const nameTheme = () => {
    const button = find("#theme"), name = isDark() ? "Light" : "Dark";
    if (button && button.textContent !== name) button.textContent = name;
  };
  window.switchTheme = () => {
    document.body.classList.toggle("dark");
    localStorage.setItem("ov_decidiffusion theme", isDark() ? "dark" : "light");
    nameTheme();
  };

  // A small model's words: completions of the last one, and unknown words with the nearest known ones.
  let vocabulary = null;
  const readVocabulary = () => {
    const data = find("#known")?.dataset.words;
    if (!data) return null;
    const { phrases, small } = JSON.parse(data);
    const words = [...new Set(phrases.flatMap((one) => one.match(/[a-z]+/g)))];
    const telling = words.filter((word) => !small.includes(word));
    return { phrases, words: telling, known: new Set([...words, ...small]) };
  };
  const distance = (one, other) => {
    let row = [...Array(other.length + 1).keys()];
    for (let i = 1; i <= one.length; i++) {
      const next = [i];
      for (let j = 1; j <= other.length; j++) {
        next[j] = Math.min(row[j] + 1, next[j - 1] + 1, row[j - 1] + (one[i - 1] !== other[j - 1]));
      }
      row = next;
    }
    return row[other.length];
  };
  const chip = (text, label, click) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = text;
    button.ariaLabel = label;
    button.addEventListener("click", click);
    return button;
  };
  const completions = (typed) => {
    const fragment = typed.match(/[a-z]{2,}$/i)?.[0].toLowerCase();
    if (!fragment || vocabulary.known.has(fragment)) return [];
    // The end of the text may begin a phrase, with or without its article, or else a word of a phrase.
    const found = new Map();
    for (let at = 0; at < typed.length; at++) {
      if (at && typed[at - 1] !== " ") continue;
      const tail = typed.slice(at).toLowerCase();
      for (const phrase of vocabulary.phrases) {
        for (const form of [phrase, phrase.replace(/^(a|an) /, "")]) {
          if (form.startsWith(tail)) found.set(form, found.get(form) ?? typed.slice(0, at) + form);
        }
      }
    }
    if (!found.size) {
      for (const word of vocabulary.words.filter((one) => one.startsWith(fragment))) {
        found.set(word, typed.slice(0, typed.length - fragment.length) + word);
      }
    }
    return [...found].slice(0, 5);
  };
  const lookAtWords = () => {
    const place = find("#known"), field = find("#prompt textarea, #prompt input");
    vocabulary ??= readVocabulary();
    if (!place || !field || !vocabulary?.phrases.length) return;
    const typed = field.value, asked = `${typed} ${find("#negative textarea, #negative input")?.value ?? ""}`;
    const found = completions(typed);
    const chips = found.map(([phrase, text]) => chip(phrase, `Complete with ${phrase}`, () => { setText(field, text); field.focus(); }));
    const typing = found.length ? typed.match(/[a-z]+$/i)[0].toLowerCase() : "";
    const unknown = [...new Set(asked.toLowerCase().match(/\p{L}+/gu) ?? [])]
      .filter((word) => !vocabulary.known.has(word) && word !== typing);
    for (const word of unknown.slice(0, 4)) {
      const told = document.createElement("span");
      told.append("Not known: ", Object.assign(document.createElement("span"), { className: "unknown", textContent: word }));
      chips.push(told);
      if (!typed.toLowerCase().includes(word)) continue;
      const most = Math.max(2, word.length / 2);
      const near = vocabulary.words.map((one) => [distance(word, one), one]).filter(([far]) => far <= most)
        .sort(([a], [b]) => a - b).slice(0, 3).map(([, one]) => one);
      for (const other of near) {
        const replaced = () => setText(field, field.value.replace(new RegExp(`(?<!\\p{L})${word}(?!\\p{L})`, "iu"), other));
        chips.push(chip(other, `Replace ${word} with ${other}`, replaced));
      }
    }
    place.replaceChildren(...chips);
  };
  document.addEventListener("input", (event) => event.target.closest?.("#prompt, #negative") && lookAtWords());

  // Show the status in the tab's title, move the focus to Stop and back, and on a phone scroll to the picture.
  let last = "", prompt = "", running = false, stopping = false;
  const look = () => {
    const text = find("#status [role=status]")?.textContent ?? "";
    const stop = isShown(find("#stop"));
    if (stop !== stopping) {
      const active = document.activeElement;
      if (stop && active === find("#generate")) find("#stop").focus();
      if (!stop && (active === document.body || active === find("#stop"))) find("#generate")?.focus({ preventScroll: true });
      stopping = stop;
    }
    const field = find("#prompt textarea, #prompt input");
    if (field && field.value !== prompt) {
      prompt = field.value;
      lookAtWords();
    }
    for (const item of document.querySelectorAll(".thumbnail-item")) {
      const name = item.querySelector(".caption-label")?.textContent.trim();
      if (name && item.ariaLabel !== name) item.ariaLabel = name;
      if (name && item.querySelector("img")?.alt) item.querySelector("img").alt = "";  // the button has this name already
    }
    nameTheme();
    if (text === last) return;
    last = text;
    const now = /^(Step|Reading|Loading|Decoding|[AB]: )|ahead of yours/.test(text);
    document.title = now ? `${text} – ${title}` : title;
    if (now && !running && window.innerWidth <= 800) find("#card")?.scrollIntoView({ behavior: "smooth", block: "nearest" });
    running = now;
  };
  const begin = () => {
    const theme = localStorage.getItem("ov_decidiffusion theme");
    if (theme) document.body.classList.toggle("dark", theme === "dark");
    // Look once for all changes within a moment: looking takes time that the pictures need.
    let waiting = false;
    const later = () => {
      if (waiting) return;
      waiting = true;
      setTimeout(() => { waiting = false; look(); }, 60);
    };
    new MutationObserver(later).observe(document, { subtree: true, childList: true, characterData: true });
    setInterval(look, 1000);
  };
  document.body ? begin() : addEventListener("DOMContentLoaded", begin);
})();
