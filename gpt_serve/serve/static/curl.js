// The commands that ask what the page has just asked, for a POSIX shell.

export function commands(tasks, topK, imageName, hasKey) {
  const address = quoted(new URL("predict", location.href).href);
  const key = hasKey ? ' -H "X-API-Key: $GPT_SERVE_KEY"' : "";
  return tasks
    .map((task) => `curl${key} -F task=${task} -F top_k=${topK} -F ${quoted(`image=@${filePart(imageName)}`)} ${address}`)
    .join("\n");
}

/** A file name as curl's -F reads it: in quotes where it would take a comma or semicolon for its own. */
function filePart(name) {
  return /[,;"\\]/.test(name) ? `"${name.replace(/["\\]/g, "\\$&")}"` : name;
}

/** One word for the shell, whatever is in it. */
function quoted(text) {
  return /^[\w@%+=:,./-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`;
}
