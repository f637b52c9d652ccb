package cli

import (
	"context"

	"github.com/cloudos-io/cloudos/api"
	"github.com/cloudos-io/cloudos/internal/cli/command"
)

// Headings of the help.
const (
	groupCommon = "Common commands"
	groupManage = "Management commands"
	groupOther  = "Commands"
)

// as gives a command of a group its short form's name.
func as(c *command.Command, name, group string, aliases ...string) *command.Command {
	c.Name, c.Group, c.Aliases = name, group, aliases
	return c
}

// group is a command that holds others.
func group(name, short string, aliases []string, sub func() []*command.Command) *command.Command {
	return &command.Command{Name: name, Aliases: aliases, Short: short, Group: groupManage, Sub: sub}
}

// root is the whole command line.
func (a *App) root() *command.Command {
	return &command.Command{
		Name:  "servin",
		Long:  "Servin runs containers. Commands that Docker has work as there.",
		Flags: a.globalFlags,
		Sub:   a.commands,
	}
}

func (a *App) globalFlags(f *command.FlagSet) {
	f.String(&a.host, "host", "H", "Engine to talk to: unix:///path, tcp://host:port, ssh://user@host")
	f.String(&a.ctxName, "context", "c", "Context to use (see 'servin context')").Of("context")
	f.String(&a.configDir, "config", "", "Directory of the configuration (default ~/.config/servin)").Of("file")
	f.Bool(&a.debug, "debug", "D", "Say more about failures")
	f.Bool(&a.version, "version", "v", "Print the version and leave")
	f.Bool(&a.useTLS, "tls", "", "Use TLS to a tcp host, whoever it claims to be")
	f.Bool(&a.verifyTLS, "tlsverify", "", "Use TLS to a tcp host and check its certificate")
	f.String(&a.tls.CA, "tlscacert", "", "Authority that the engine's certificate must come from").Of("file")
	f.String(&a.tls.Cert, "tlscert", "", "Certificate to show to the engine").Of("file")
	f.String(&a.tls.Key, "tlskey", "", "Key of that certificate").Of("file")
	level := ""
	f.String(&level, "log-level", "l", "").Hide()
}

// commands are the short forms, then the groups. A word that both have (images)
// is the group, which lists when nothing follows.
func (a *App) commands() []*command.Command {
	return []*command.Command{
		as(a.cmdRun(), "run", groupCommon),
		as(a.cmdExec(), "exec", groupCommon),
		as(a.cmdPs(), "ps", groupCommon),
		as(a.cmdLogs(), "logs", groupCommon),
		as(a.cmdStop(), "stop", groupCommon),
		as(a.cmdRm(), "rm", groupCommon),
		as(a.cmdPull(), "pull", groupCommon),
		as(a.cmdPush(), "push", groupCommon),
		as(a.cmdBuild(), "build", groupCommon),
		as(a.cmdLogin(), "login", groupCommon),
		as(a.cmdInfo(), "info", groupCommon),
		as(a.cmdVersion(), "version", groupCommon),

		listing("containers", "Containers: everything about them", []string{"container"}, a.containers),
		listing("images", "Images; alone, list them", []string{"image"}, a.images),
		listing("volumes", "Volumes", []string{"volume"}, a.volumes),
		listing("networks", "Networks", []string{"network"}, a.networks),
		group("builder", "Builds and their cache", nil, a.builder),
		listing("secrets", "Secrets that containers get as files", []string{"secret"}, func() []*command.Command { return a.secrets(api.KindSecret) }),
		listing("configs", "Configs that containers get as files", []string{"config"}, func() []*command.Command { return a.secrets(api.KindConfig) }),
		group("system", "The engine and its host", nil, a.system),
		group("context", "Engines by name", nil, a.contexts),
		group("registry", "Registries' credentials", nil, a.registries),
		group("mode", "Where containers run", nil, a.mode),
		group("vm", "The virtual machine of VM mode", nil, a.vm),
		a.bundled("compose", "Run the services of a Compose file", groupManage),
		a.bundled("tui", "Look and act in a full-screen interface", groupManage),

		as(a.cmdAttach(), "attach", groupOther),
		as(a.cmdCommit(), "commit", groupOther),
		as(a.cmdCompletion(), "completion", groupOther),
		as(a.cmdCp(), "cp", groupOther),
		as(a.cmdCreate(), "create", groupOther),
		as(a.cmdDebug(), "debug", groupOther),
		as(a.cmdDiff(), "diff", groupOther),
		as(a.cmdEvents(), "events", groupOther),
		as(a.cmdExport(), "export", groupOther),
		as(a.cmdHistory(), "history", groupOther),
		as(a.cmdImport(), "import", groupOther),
		as(a.cmdInspectAny(), "inspect", groupOther),
		as(a.cmdKill(), "kill", groupOther),
		as(a.cmdLoad(), "load", groupOther),
		as(a.cmdLogout(), "logout", groupOther),
		as(a.cmdPause(), "pause", groupOther),
		as(a.cmdPort(), "port", groupOther),
		as(a.cmdRename(), "rename", groupOther),
		as(a.cmdRestart(), "restart", groupOther),
		as(a.cmdRmi(), "rmi", groupOther),
		as(a.cmdSave(), "save", groupOther),
		as(a.cmdSearch(), "search", groupOther),
		as(a.cmdStart(), "start", groupOther),
		as(a.cmdStats(), "stats", groupOther),
		as(a.cmdTag(), "tag", groupOther),
		as(a.cmdTop(), "top", groupOther),
		as(a.cmdUnpause(), "unpause", groupOther),
		as(a.cmdUpdate(), "update", groupOther),
		as(a.cmdWait(), "wait", groupOther),
		as(a.cmdWatch(), "watch", groupOther),
		a.cmdComplete(),
		a.cmdHelp(),
	}
}

// cmdHelp is "servin help COMMAND".
func (a *App) cmdHelp() *command.Command {
	return &command.Command{Name: "help", Args: "[COMMAND...]", Short: "Show the help of a command", Hidden: true, Raw: true, Max: -1,
		Run: func(ctx context.Context, args []string) error {
			root := a.root()
			cmd, path := root, root.Name
			for _, w := range args {
				next := cmd.Find(w)
				if next == nil {
					return &command.UnknownError{Path: path, Name: w, Nested: true}
				}
				cmd, path = next, path+" "+next.Name
			}
			return a.help(root, &command.Invocation{Command: cmd, Path: path})
		}}
}

// listing is a group that lists when no command follows.
func listing(name, short string, aliases []string, sub func() []*command.Command) *command.Command {
	g := group(name, short, aliases, sub)
	g.Default = "ls"
	g.DefaultArgs = name == "images"
	return g
}

func (a *App) containers() []*command.Command {
	return []*command.Command{
		a.cmdPs(), a.cmdCreate(), a.cmdStart(), a.cmdStop(), a.cmdRm(), a.cmdRun(), a.cmdExec(), a.cmdLogs(), a.cmdAttach(),
		a.cmdCommit(), a.cmdCp(), a.cmdDiff(), a.cmdExport(), a.cmdInspectContainer(), a.cmdKill(), a.cmdPause(), a.cmdPort(),
		a.cmdContainerPrune(), a.cmdRename(), a.cmdRestart(), a.cmdStats(), a.cmdTop(), a.cmdUnpause(), a.cmdUpdate(), a.cmdWait(),
		a.cmdCheckpoint(), a.cmdRestore(), a.cmdMigrate(),
	}
}

func (a *App) images() []*command.Command {
	return []*command.Command{
		a.cmdImages(), a.cmdPull(), a.cmdBuild(), a.cmdPush(), a.cmdHistory(), a.cmdImport(), a.cmdInspectImage(), a.cmdLoad(),
		a.cmdImagePrune(), a.cmdRmi(), a.cmdSave(), a.cmdSBOM(), a.cmdScan(), a.cmdTag(), a.cmdVerify(),
	}
}
