// What Streamlit's widgets lack: where typing goes, and a list that makes way on a phone. Added to the document once.
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

  // A conversation that was chosen is to be seen, and written in.
  document.addEventListener("click", event => {
    if (!event.target.closest?.(".st-key-conversations button, .st-key-new button")) return;
    if (!wide()) document.querySelector("[data-testid=stSidebarCollapseButton] button")?.click();
    else if (event.detail > 0) document.activeElement.blur();  // by the mouse: the keyboard stays where it is
  });
})();
