package cli

import (
	"bytes"
	"fmt"
	"sort"

	"github.com/cloudos-io/cloudos/internal/cli/command"
)

// Reference writes the pages of docs/cli: file name to text.
func Reference() (map[string][]byte, error) {
	a := &App{Config: Config{Getenv: func(string) string { return "" }}}
	root := a.root()
	pages := map[string][]byte{}
	var index bytes.Buffer
	index.WriteString("# The command line\n\nWritten from the table of commands by `go run ./internal/cli/gendocs`.\n\n" + root.Long + "\n\n## Global options\n\nThey come before the command.\n\n")
	if err := command.WriteFlags(&index, root); err != nil {
		return nil, err
	}
	index.WriteString("Without `--host` and `--context`, `SERVIN_HOST` names the engine, then `SERVIN_CONTEXT`, then the context in use, then the host's own socket.\n\n")
	var groups, singles []*command.Command
	for _, c := range root.Sub() {
		switch {
		case c.Hidden:
		case c.Sub != nil:
			groups = append(groups, c)
		default:
			singles = append(singles, c)
		}
	}
	index.WriteString("## Groups\n\n| group | what it is about |\n|---|---|\n")
	for _, g := range groups {
		var page bytes.Buffer
		if err := command.WriteMarkdown(&page, g, root.Name+" "+g.Name); err != nil {
			return nil, err
		}
		pages[g.Name+".md"] = page.Bytes()
		fmt.Fprintf(&index, "| [`servin %s`](%s.md) | %s |\n", g.Name, g.Name, g.Short)
	}
	sort.Slice(singles, func(i, j int) bool { return singles[i].Name < singles[j].Name })
	index.WriteString("\n## Short forms\n\n| command | what it does |\n|---|---|\n")
	var page bytes.Buffer
	page.WriteString("# Short forms\n\nThe commands without a group; most are those of `servin containers` and `servin images` under Docker's names.\n\n")
	for _, c := range singles {
		fmt.Fprintf(&index, "| [`servin %s`](commands.md#servin-%s) | %s |\n", c.Name, c.Name, c.Short)
		var one bytes.Buffer
		if err := command.WriteMarkdown(&one, c, root.Name+" "+c.Name); err != nil {
			return nil, err
		}
		page.WriteString("#")
		page.Write(one.Bytes())
		page.WriteByte('\n')
	}
	pages["commands.md"] = append(bytes.TrimRight(page.Bytes(), "\n"), '\n')
	index.WriteString("\n## Plugins\n\nAn executable `servin-NAME` on the `PATH` is the command `servin NAME`, after the commands above. It is told of the engine by `SERVIN_HOST` and `SERVIN_CONTEXT`, and of this program by `SERVIN_CLI`.\n\n" +
		"## Exit codes\n\n| code | meaning |\n|---|---|\n| 0 | it went well |\n| 1 | it did not |\n| 125 | `run`, `create`: the engine refused; any command: an option was wrong |\n| 126 | `run`, `exec`: the command cannot be executed |\n| 127 | `run`, `exec`: the command was not found |\n| other | the container's own |\n")
	pages["README.md"] = index.Bytes()
	return pages, nil
}
