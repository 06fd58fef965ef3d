// The command that asks what the page has just asked, for a POSIX shell.

export function command(tasks, topK, imageName, hasKey) {
  const address = quoted(new URL("predict", location.href).href);
  const key = hasKey ? ' -H "X-API-Key: $GPT_SERVE_KEY"' : "";
  const asked = tasks.map((task) => ` -F task=${task}`).join("");
  const labels = topK === null ? "" : ` -F top_k=${topK}`;
  return `curl${key}${asked}${labels} -F ${quoted(`image=@${filePart(imageName)}`)} ${address}`;
}

/** A file name as curl's -F reads it: in quotes where it would take a comma or semicolon for its own. */
function filePart(name) {
  return /[,;"\\]/.test(name) ? `"${name.replace(/["\\]/g, "\\$&")}"` : name;
}

/** One word for the shell, whatever is in it. */
function quoted(text) {
  return /^[\w@%+=:,./-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`;
}
