// Adds what Streamlit's widgets lack: keyboard focus, a list that closes on a phone, a button that copies an answer, and
// the language of a code block. The document gets it once.
(() => {
  if (window.torchchatKeyboard) return;
  window.torchchatKeyboard = true;

  const FIELD = "[data-testid=stChatInputTextArea]";
  const EDITOR = "[class*=st-key-text-] textarea";
  const TAKES_KEYS = "input, textarea, select, [contenteditable=true], [role=dialog], [role=listbox], [role=menu], iframe";
  const wide = () => window.innerWidth > 768;  // a phone's keyboard covers half of the page: only who asks for it gets it

  const focused = () => document.activeElement && document.activeElement !== document.body;

  function focusAtEnd(field) {
    field.focus({preventScroll: true});
    field.setSelectionRange(field.value.length, field.value.length);
  }

  // Streamlit goes to the end of the page when it grows, and so away from what is edited.
  function focusEditor(editor) {
    focusAtEnd(editor);
    for (const delay of [50, 200, 500]) setTimeout(() => editor.scrollIntoView({block: "nearest"}), delay);
  }

  // A field that was not there before gets the focus, unless it is elsewhere by somebody's choice. Dialogs stand outside
  // of what Streamlit marks as light or dark.
  let field = null, editor = null;
  new MutationObserver(() => {
    const scheme = getComputedStyle(document.querySelector(".stApp") ?? document.body).colorScheme;
    if (scheme !== "normal") document.documentElement.style.colorScheme = scheme;
    for (const code of document.querySelectorAll(".stChatMessage .stCode code[class*=language-]"))
      code.closest(".stCode").dataset.language = code.className.match(/language-(\S+)/)[1];
    const [newField, newEditor] = [document.querySelector(FIELD), document.querySelector(EDITOR)];
    if (newEditor && newEditor !== editor) focusEditor(newEditor);
    else if (newField && (newField !== field || (editor && !newEditor)) && !focused() && wide()) focusAtEnd(newField);
    [field, editor] = [newField, newEditor];
  }).observe(document.body, {childList: true, subtree: true});

  // Letters typed anywhere are meant for the message.
  document.addEventListener("keydown", event => {
    const message = document.querySelector(FIELD);
    if (event.key.length !== 1 || event.key === " " || event.ctrlKey || event.altKey || event.metaKey || !message) return;
    if (event.target.closest?.(TAKES_KEYS) || document.querySelector("[role=dialog]")) return;
    event.stopImmediatePropagation();  // Streamlit has shortcuts of single letters, for those who write pages
    focusAtEnd(message);
  }, true);

  // Copies without a rerun of the page. Pages of another host have no clipboard over http: copy a selection there.
  async function copy(text) {
    if (navigator.clipboard) return navigator.clipboard.writeText(text);
    const field = document.body.appendChild(Object.assign(document.createElement("textarea"), {value: text}));
    field.select();
    const done = document.execCommand("copy");
    field.remove();
    if (!done) throw new Error("the browser cannot copy");
  }

  document.addEventListener("click", event => {
    const button = event.target.closest?.("[class*=st-key-copy-] button");
    const source = button?.closest("[class*=st-key-copied-]")?.querySelector("[data-copied]");
    if (!source) return;
    event.stopImmediatePropagation();
    copy(source.dataset.copied).then(() => {
      button.dataset.done = "";
      setTimeout(() => delete button.dataset.done, 1500);
    });
  }, true);

  // A conversation that was chosen is to be seen, and written in.
  document.addEventListener("click", event => {
    if (!event.target.closest?.(".st-key-conversations button, .st-key-new button")) return;
    if (!wide()) document.querySelector("[data-testid=stSidebarCollapseButton] button")?.click();
    else if (event.detail > 0) document.activeElement.blur();  // by the mouse: the keyboard stays where it is
  });
})();
