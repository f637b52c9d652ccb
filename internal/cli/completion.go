package cli

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/cloudos-io/cloudos/api"
	"github.com/cloudos-io/cloudos/client"
	"github.com/cloudos-io/cloudos/internal/cli/command"
	"github.com/cloudos-io/cloudos/internal/cli/config"
)

// The scripts ask `servin __complete WORD...` for candidates, the last word being
// the one that is typed. It prints one a line, a tab and a description behind,
// and at the end ":file" when file names are wanted too, ":" otherwise.

const bashCompletion = `# bash completion for servin: source <(servin completion bash)
_servin() {
    local cur words cword
    if declare -F _get_comp_words_by_ref >/dev/null; then
        _get_comp_words_by_ref -n =: cur words cword
    else
        words=("${COMP_WORDS[@]}"); cword=$COMP_CWORD; cur=${words[cword]}
    fi
    local line mode=""
    COMPREPLY=()
    while IFS= read -r line; do
        case $line in
            :*) mode=${line#:} ;;
            *) COMPREPLY+=("${line%%$'\t'*}") ;;
        esac
    done < <("${words[0]}" __complete "${words[@]:1:cword}" 2>/dev/null)
    if [[ $mode == file ]]; then
        local f; while IFS= read -r f; do COMPREPLY+=("$f"); done < <(compgen -f -- "$cur")
        compopt -o filenames 2>/dev/null
    fi
    if declare -F __ltrim_colon_completions >/dev/null; then
        __ltrim_colon_completions "$cur"
    fi
}
complete -F _servin servin
`

const zshCompletion = `#compdef servin
# zsh completion for servin: source <(servin completion zsh)
_servin() {
    local -a out with
    local line mode
    while IFS= read -r line; do
        case $line in
            :*) mode=${line#:} ;;
            *) local w=${line%%$'\t'*} d=${line#*$'\t'}
               w=${w//:/\\:}
               if [[ $d == $line || -z $d ]]; then with+=("$w"); else with+=("$w:$d"); fi ;;
        esac
    done < <(${words[1]} __complete "${(@)words[2,CURRENT]}" 2>/dev/null)
    (( $#with )) && _describe -V servin with
    [[ $mode == file ]] && _files
}
if [[ $funcstack[1] == _servin ]]; then _servin "$@"; else compdef _servin servin; fi
`

const fishCompletion = `# fish completion for servin: servin completion fish | source
function __servin_complete
    set -l words (commandline -opc)
    set -l out ($words[1] __complete $words[2..-1] (commandline -ct) 2>/dev/null)
    for line in $out
        switch $line
            case ':file'
                __fish_complete_path (commandline -ct)
            case ':*'
            case '*'
                echo $line
        end
    end
end
complete -c servin -f -a '(__servin_complete)'
`

const powershellCompletion = `# PowerShell completion for servin: servin completion powershell | Out-String | Invoke-Expression
Register-ArgumentCompleter -Native -CommandName servin -ScriptBlock {
    param($wordToComplete, $commandAst, $cursorPosition)
    $words = @($commandAst.CommandElements | Where-Object { $_.Extent.StartOffset -lt $cursorPosition } | ForEach-Object { $_.ToString() })
    $rest = @($words | Select-Object -Skip 1)
    if ($wordToComplete -eq '') { $rest += '' }
    & $words[0] __complete @rest 2>$null | ForEach-Object {
        if ($_.StartsWith(':')) { return }
        $parts = $_ -split [char]9, 2
        $help = if ($parts.Count -gt 1 -and $parts[1]) { $parts[1] } else { $parts[0] }
        [System.Management.Automation.CompletionResult]::new($parts[0], $parts[0], 'ParameterValue', $help)
    }
}
`

// deadline bounds what completion waits for the engine.
const deadline = 2 * time.Second

func (a *App) cmdCompletion() *command.Command {
	return &command.Command{Name: "completion", Args: "bash|zsh|fish|powershell", Short: "Print a shell's completion script", Group: groupOther, Min: 1, Max: 1, Complete: []string{"shell"},
		Example: `source <(servin completion bash)
servin completion zsh > "${fpath[1]}/_servin"
servin completion fish > ~/.config/fish/completions/servin.fish`,
		Run: func(ctx context.Context, args []string) error {
			script := ""
			switch args[0] {
			case "bash":
				script = bashCompletion
			case "zsh":
				script = zshCompletion
			case "fish":
				script = fishCompletion
			case "powershell", "pwsh":
				script = powershellCompletion
			default:
				return usagef("no completion for %q: it is there for bash, zsh, fish and powershell", args[0])
			}
			_, err := a.out.WriteString(script)
			return err
		}}
}

func (a *App) cmdComplete() *command.Command {
	return &command.Command{Name: "__complete", Raw: true, Hidden: true, Max: -1,
		Run: func(ctx context.Context, args []string) error {
			c := command.Complete(a.root(), args)
			for _, x := range c.Candidates {
				fmt.Fprintf(a.out, "%s\t%s\n", x.Word, x.Help)
			}
			ctx, cancel := context.WithTimeout(ctx, deadline)
			defer cancel()
			for _, w := range a.candidates(ctx, c.Kind) {
				if strings.HasPrefix(w, c.Prefix) {
					fmt.Fprintf(a.out, "%s%s\n", c.Before, w)
				}
			}
			if c.Kind == "file" || c.Kind == "containerpath" {
				fmt.Fprintln(a.out, ":file")
			} else {
				fmt.Fprintln(a.out, ":")
			}
			return nil
		}}
}

// candidates are the words of a kind. What cannot be found out is no candidate.
func (a *App) candidates(ctx context.Context, kind string) []string {
	switch kind {
	case "pull":
		return []string{"always", "missing", "never"}
	case "restart":
		return []string{"no", "always", "unless-stopped", "on-failure"}
	case "logdriver":
		return []string{"json-file", "local", "k8s-file", "journald", "syslog", "fluentd", "none"}
	case "type":
		return []string{"container", "image", "network", "volume"}
	case "sbomformat":
		return []string{"table", "spdx-json", "cyclonedx-json", "syft-json"}
	case "scanformat":
		return []string{"table", "json", "sarif"}
	case "severity":
		return []string{"negligible", "low", "medium", "high", "critical"}
	case "shell":
		return []string{"bash", "zsh", "fish", "powershell"}
	case "platform":
		return []string{"linux/amd64", "linux/arm64", "linux/arm/v7"}
	case "signal":
		return []string{"SIGTERM", "SIGKILL", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2"}
	case "capability":
		return strings.Fields("ALL AUDIT_CONTROL AUDIT_READ AUDIT_WRITE BLOCK_SUSPEND BPF CHECKPOINT_RESTORE CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID IPC_LOCK IPC_OWNER KILL LEASE LINUX_IMMUTABLE MAC_ADMIN MAC_OVERRIDE MKNOD NET_ADMIN NET_BIND_SERVICE NET_BROADCAST NET_RAW PERFMON SETFCAP SETGID SETPCAP SETUID SYSLOG SYS_ADMIN SYS_BOOT SYS_CHROOT SYS_MODULE SYS_NICE SYS_PACCT SYS_PTRACE SYS_RAWIO SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG WAKE_ALARM")
	case "context":
		out := []string{config.DefaultContext}
		list, _ := config.Contexts(a.dir())
		for _, c := range list {
			out = append(out, c.Name)
		}
		return out
	case "plugin":
		var out []string
		for _, p := range a.pluginList() {
			out = append(out, p[0])
		}
		return out
	case "", "file":
		return nil
	}
	c, err := a.client()
	if err != nil {
		return nil
	}
	switch kind {
	case "container", "running", "stopped", "containerpath", "any":
		out := a.containerCandidates(ctx, c, kind)
		if kind == "any" {
			out = append(append(append(out, a.imageCandidates(ctx, c)...), a.candidates(ctx, "volume")...), a.candidates(ctx, "network")...)
		}
		return out
	case "image":
		return a.imageCandidates(ctx, c)
	case "volume":
		var out []string
		r, _ := c.VolumeList(ctx, nil)
		for _, v := range r.Volumes {
			out = append(out, v.Name)
		}
		return out
	case "secret", "config":
		var out []string
		list, _ := c.SecretList(ctx, api.SecretKind(kind))
		for _, x := range list {
			out = append(out, x.Name)
		}
		return out
	case "network":
		var out []string
		list, _ := c.NetworkList(ctx, nil)
		for _, n := range list {
			out = append(out, n.Name)
		}
		return out
	}
	return nil
}

func (a *App) containerCandidates(ctx context.Context, c *client.Client, kind string) []string {
	o := client.ContainerListOptions{All: kind != "running"}
	if kind == "stopped" {
		o.Filters = client.Filters{"status": {"created", "exited", "dead"}}
	}
	list, _ := c.ContainerList(ctx, o)
	var out []string
	for _, x := range list {
		for _, n := range x.Names {
			n = strings.TrimPrefix(n, "/")
			if kind == "containerpath" {
				n += ":"
			}
			out = append(out, n)
		}
	}
	return out
}

func (a *App) imageCandidates(ctx context.Context, c *client.Client) []string {
	list, _ := c.ImageList(ctx, client.ImageListOptions{})
	var out []string
	for _, im := range list {
		for _, t := range im.RepoTags {
			if !strings.HasPrefix(t, none) {
				out = append(out, t)
			}
		}
	}
	return out
}
