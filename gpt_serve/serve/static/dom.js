// A way to write elements down.

/** An element with properties, and children that are elements or text. Text is never read as HTML. */
export function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}
