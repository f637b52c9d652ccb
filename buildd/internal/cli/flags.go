package cli

import (
	"fmt"
	"io"
	"strings"

	"github.com/docker/go-units"
	"github.com/spf13/pflag"
)

// flags are Docker's, with Docker's names.
type flags struct {
	tags, buildArgs, labels, annotations, addHosts, platforms, outputs   []string
	cacheFrom, cacheTo, contexts, secrets, ssh, allow, attests, ulimits  []string
	noCacheFilter                                                        []string
	file, target, network, progress, iidFile, metadataFile, cgroupParent string
	sbom, provenance, call, shmSize, memory, memorySwap                  string
	cpusetCPUs, cpusetMems                                               string
	cpuShares, cpuPeriod, cpuQuota                                       int64
	noCache, pull, push, load, quiet, check, help                        bool

	set  *pflag.FlagSet
	args []string
}

func parseFlags(args []string, out io.Writer) (*flags, error) {
	f := &flags{}
	s := pflag.NewFlagSet("servin build", pflag.ContinueOnError)
	s.SetOutput(io.Discard)
	s.SortFlags = true
	s.StringArrayVarP(&f.tags, "tag", "t", nil, "`NAME[:TAG]` of the image")
	s.StringVarP(&f.file, "file", "f", "", "Dockerfile (default PATH/Dockerfile; - is standard input)")
	s.StringArrayVar(&f.buildArgs, "build-arg", nil, "Set `NAME=VALUE` for ARG; NAME alone takes it from the environment")
	s.StringVar(&f.target, "target", "", "Stage to build")
	s.StringSliceVar(&f.platforms, "platform", nil, "Platforms to build for, such as linux/arm64")
	s.StringArrayVarP(&f.outputs, "output", "o", nil, "Where the result goes: type=local|tar|oci|docker|image|registry|cacheonly,dest=PATH or a directory (default: an image of the engine)")
	s.BoolVar(&f.push, "push", false, "Push the image: --output type=registry")
	s.BoolVar(&f.load, "load", false, "Make an image of the engine (the default)")
	s.BoolVar(&f.noCache, "no-cache", false, "Use no cache")
	s.StringArrayVar(&f.noCacheFilter, "no-cache-filter", nil, "Use no cache for these stages")
	s.BoolVar(&f.pull, "pull", false, "Ask registries for newer base images")
	s.StringArrayVar(&f.cacheFrom, "cache-from", nil, "Take cache from an image or type=registry|local,…")
	s.StringArrayVar(&f.cacheTo, "cache-to", nil, "Leave cache in type=inline|registry|local,…")
	s.StringArrayVar(&f.contexts, "build-context", nil, "Further context, `NAME=VALUE`: a path, an address, docker-image://REF")
	s.StringArrayVar(&f.secrets, "secret", nil, "Secret for RUN --mount=type=secret: id=NAME[,src=FILE|,env=VARIABLE]")
	s.StringArrayVar(&f.ssh, "ssh", nil, "SSH agent or keys for RUN --mount=type=ssh: default|ID[=SOCKET|KEY]")
	s.StringArrayVar(&f.labels, "label", nil, "Set a label, `NAME=VALUE`")
	s.StringArrayVar(&f.annotations, "annotation", nil, "Set an annotation, `NAME=VALUE`")
	s.StringSliceVar(&f.addHosts, "add-host", nil, "Name for RUN, `HOST:IP`")
	s.StringVar(&f.network, "network", "default", "Network of RUN: default, none or host")
	s.StringArrayVar(&f.allow, "allow", nil, "Allow network.host or security.insecure")
	s.StringArrayVar(&f.attests, "attest", nil, "Attestation: type=sbom|provenance,…")
	s.StringVar(&f.sbom, "sbom", "", "Short for --attest type=sbom: true or generator=IMAGE")
	s.StringVar(&f.provenance, "provenance", "", "Short for --attest type=provenance: true, mode=min, mode=max or false")
	s.StringArrayVar(&f.ulimits, "ulimit", nil, "Limit for RUN, NAME=SOFT[:HARD]")
	s.StringVar(&f.shmSize, "shm-size", "", "Size of /dev/shm for RUN")
	s.StringVarP(&f.memory, "memory", "m", "", "Memory limit of a RUN")
	s.StringVar(&f.memorySwap, "memory-swap", "", "Memory and swap limit of a RUN, -1 for any swap")
	s.Int64VarP(&f.cpuShares, "cpu-shares", "c", 0, "CPU weight of a RUN")
	s.Int64Var(&f.cpuPeriod, "cpu-period", 0, "CPU period of a RUN in microseconds")
	s.Int64Var(&f.cpuQuota, "cpu-quota", 0, "CPU time of a RUN in each period, in microseconds")
	s.StringVar(&f.cpusetCPUs, "cpuset-cpus", "", "CPUs that a RUN may use")
	s.StringVar(&f.cpusetMems, "cpuset-mems", "", "Memory nodes that a RUN may use")
	s.StringVar(&f.cgroupParent, "cgroup-parent", "", "Parent of the cgroups of RUN")
	s.StringVar(&f.progress, "progress", "auto", "How progress is shown: auto, plain, tty, rawjson, quiet")
	s.BoolVarP(&f.quiet, "quiet", "q", false, "Print the image's id alone")
	s.StringVar(&f.iidFile, "iidfile", "", "Write the image's id to a file")
	s.StringVar(&f.metadataFile, "metadata-file", "", "Write what the build answers to a file, as JSON")
	s.StringVar(&f.call, "call", "build", "What to do: build, check, outline, targets")
	s.BoolVar(&f.check, "check", false, "Check the Dockerfile, do not build: --call check")
	s.BoolVarP(&f.help, "help", "h", false, "Show this help")
	for _, name := range []string{"rm", "force-rm", "compress"} { // of the classic builder, without a meaning here
		s.Bool(name, false, "")
		_ = s.MarkHidden(name)
	}
	for _, name := range []string{"isolation", "security-opt", "builder"} {
		s.String(name, "", "")
		_ = s.MarkHidden(name)
	}
	s.Bool("squash", false, "")
	_ = s.MarkHidden("squash")
	f.set = s
	if err := s.Parse(args); err != nil {
		return nil, usageError{err}
	}
	if f.help {
		fmt.Fprintf(out, "Usage: servin build [OPTIONS] PATH|URL|-\n\nBuild an image from a Dockerfile.\n\nOptions:\n%s", s.FlagUsagesWrapped(100))
		return f, nil
	}
	if v, _ := s.GetBool("squash"); v {
		return nil, usageError{fmt.Errorf("--squash is not supported: use a multi-stage build")}
	}
	f.args = s.Args()
	if len(f.args) != 1 {
		return nil, usageError{fmt.Errorf("one PATH, URL or - is wanted, not %d", len(f.args))}
	}
	if f.check {
		f.call = "check"
	}
	if f.quiet {
		f.progress = "quiet"
	}
	return f, nil
}

// usageError is a command line that makes no sense.
type usageError struct{ error }

// size reads 512m.
func size(flag, v string) (string, error) {
	if v == "-1" {
		return v, nil
	}
	n, err := units.RAMInBytes(v)
	if err != nil {
		return "", usageError{fmt.Errorf("--%s %q is no size: %w", flag, v, err)}
	}
	return fmt.Sprint(n), nil
}

// pair splits NAME=VALUE.
func pair(flag, v string) (name, value string, err error) {
	name, value, ok := strings.Cut(v, "=")
	if !ok || name == "" {
		return "", "", usageError{fmt.Errorf("--%s %q is not NAME=VALUE", flag, v)}
	}
	return name, value, nil
}
