package compose

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"strings"

	"github.com/cloudos-io/cloudos/internal/cli/command"
	"github.com/cloudos-io/cloudos/internal/compose/model"
)

// Headings of the help.
const (
	groupRun     = "Run"
	groupLook    = "Look"
	groupImages  = "Images"
	groupProject = "Project"
)

func (a *app) root() *command.Command {
	return &command.Command{Name: "servin compose", Long: "Compose runs the services of a Compose file: several containers with their networks and volumes.",
		Flags: a.globalFlags, Sub: a.commands}
}

func (a *app) globalFlags(f *command.FlagSet) {
	f.Strings(&a.opt.Files, "file", "f", "Compose file (several add up; default compose.yaml here or above)").Of("file")
	f.String(&a.opt.Name, "project-name", "p", "Name of the project (default the folder's)")
	f.Strings(&a.opt.Profiles, "profile", "", "Enable a profile; * enables all")
	f.Strings(&a.opt.EnvFiles, "env-file", "", "File of variables for the Compose file (default .env)").Of("file")
	f.String(&a.opt.Directory, "project-directory", "", "Folder that relative paths begin in (default the first file's)").Of("file")
	f.Bool(&a.opt.AllResources, "all-resources", "", "Make networks and volumes that no service uses, too")
	f.Bool(&a.opt.Compatibility, "compatibility", "", "Name containers as Compose 1 did, with underscores")
	f.Bool(&a.dryRun, "dry-run", "", "Show what would be done and do nothing")
	f.Int(&a.parallel, "parallel", "", "Bound what is done at a time; -1 is no bound")
	f.String(&a.progress, "progress", "", "How to show progress: auto, tty, plain, json, quiet")
	f.String(&a.ansi, "ansi", "", "Colours and cursor movement: never, always, auto")
	f.String(&a.opt.Directory, "workdir", "", "").Hide()
	f.Bool(&a.verbose, "verbose", "", "").Hide()
	f.Bool(&a.version, "version", "v", "Print the version and leave").Hide()
	f.Add("no-ansi", "", "", "", func(string) error { a.ansi = "never"; return nil }).Or("true").Hide()
}

// in gives a command its heading and the flags that all have.
func (a *app) in(group string, c *command.Command) *command.Command {
	c.Group = group
	flags := c.Flags
	c.Flags = func(f *command.FlagSet) {
		if flags != nil {
			flags(f)
		}
		f.Bool(&a.dryRun, "dry-run", "", "Show what would be done and do nothing").Hide()
	}
	return c
}

func (a *app) commands() []*command.Command {
	return []*command.Command{
		a.in(groupRun, a.cmdUp()),
		a.in(groupRun, a.cmdDown()),
		a.in(groupRun, a.cmdCreate()),
		a.in(groupRun, a.cmdStart()),
		a.in(groupRun, a.cmdStop()),
		a.in(groupRun, a.cmdRestart()),
		a.in(groupRun, a.cmdKill()),
		a.in(groupRun, a.cmdPause()),
		a.in(groupRun, a.cmdUnpause()),
		a.in(groupRun, a.cmdRm()),
		a.in(groupRun, a.cmdRun()),
		a.in(groupRun, a.cmdExec()),
		a.in(groupRun, a.cmdScale()),
		a.in(groupRun, a.cmdWatch()),
		a.in(groupRun, a.cmdWait()),

		a.in(groupLook, a.cmdPs()),
		a.in(groupLook, a.cmdLogs()),
		a.in(groupLook, a.cmdTop()),
		a.in(groupLook, a.cmdStats()),
		a.in(groupLook, a.cmdEvents()),
		a.in(groupLook, a.cmdPort()),
		a.in(groupLook, a.cmdAttach()),
		a.in(groupLook, a.cmdCp()),
		a.in(groupLook, a.cmdVolumes()),

		a.in(groupImages, a.cmdBuild()),
		a.in(groupImages, a.cmdPull()),
		a.in(groupImages, a.cmdPush()),
		a.in(groupImages, a.cmdImages()),
		a.in(groupImages, a.cmdCommit()),
		a.in(groupImages, a.cmdExport()),

		a.in(groupProject, a.cmdConfig()),
		a.in(groupProject, a.cmdLs()),
		a.in(groupProject, a.cmdVersion()),
	}
}

func (a *app) cmdVersion() *command.Command {
	format, short := "", false
	return &command.Command{Name: "version", Short: "Show the version", Flags: func(f *command.FlagSet) {
		f.String(&format, "format", "f", "pretty or json")
		f.Bool(&short, "short", "", "Show the number only")
	}, Run: func(ctx context.Context, args []string) error { return a.showVersion(format, short) }}
}

func (a *app) showVersion(format string, short bool) error {
	switch {
	case short:
		fmt.Fprintln(a.out, strings.TrimPrefix(a.Version, "v"))
	case format == "json":
		return json.NewEncoder(a.out).Encode(map[string]string{"version": a.Version, "follows": "v" + model.Version})
	case format == "" || format == "pretty":
		fmt.Fprintf(a.out, "Servin Compose version %s (follows Docker Compose %s)\n", a.Version, model.Version)
	default:
		return fmt.Errorf("unsupported format %q: use pretty or json", format)
	}
	return nil
}

// writeFile puts something into a file that the user named.
func writeFile(name string, b []byte) error {
	if err := os.WriteFile(name, b, 0o666); err != nil {
		return fmt.Errorf("cannot write: %w", err)
	}
	return nil
}
