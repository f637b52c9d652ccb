package cli

import (
	"fmt"
	"time"

	"github.com/moby/moby/api/types/blkiodev"
	"github.com/moby/moby/api/types/container"

	"github.com/cloudos-io/cloudos/api"
	"github.com/cloudos-io/cloudos/internal/cli/command"
	"github.com/cloudos-io/cloudos/internal/cli/notation"
)

// createFlags are the options of run and create that describe a container.
type createFlags struct {
	name, platform, pull, cidfile    string
	quiet                            bool
	attach                           []string
	stdin, tty                       bool
	env, envFiles, labels, labelFile []string
	annotations                      []string

	entrypoint                                 string
	user, workdir, hostname, domainname        string
	stopSignal                                 string
	stopTimeout                                *int
	detachKeys                                 string
	health                                     healthFlags
	noHealthcheck                              bool
	init                                       *bool
	ports, expose                              []string
	publishAll, publishThrough                 bool
	networks, aliases, links, linkLocal        []string
	ip, ip6, mac                               string
	dns, dnsOpts, dnsSearch                    []string
	addHost                                    []string
	volumes, mounts, tmpfs, volumesFrom        []string
	volumeDriver                               string
	readOnly, privileged, autoRemove           bool
	capAdd, capDrop, groupAdd, securityOpt     []string
	ipc, pid, uts, userns, cgroupns, isolation string
	cgroupParent, runtime                      string
	logDriver                                  string
	logOpts, storageOpts, sysctls              []string
	restart                                    string
	restartUnhealthy                           bool
	shmSize                                    int64
	oomKillDisable                             bool
	oomScoreAdj                                int
	ulimits                                    []*container.Ulimit
	devices, deviceRules                       []string
	gpus                                       []container.DeviceRequest
	res                                        container.Resources
	memorySwappiness                           int64
	memorySwappinessSet, entrypointSet         bool
	useAPISocket                               bool
	secrets                                    []api.SecretRef
}

type healthFlags struct {
	cmd                                           string
	interval, timeout, startPeriod, startInterval time.Duration
	retries                                       int
}

// bytesFlag declares a flag with a size.
func bytesFlag(f *command.FlagSet, p *int64, name, short, help string) *command.Flag {
	return f.Add(name, short, "bytes", help, func(s string) (err error) {
		*p, err = notation.Bytes(s)
		return err
	})
}

func (o *createFlags) declare(f *command.FlagSet) {
	f.String(&o.name, "name", "", "Name of the container")
	f.String(&o.platform, "platform", "", "Platform of the image, os/arch[/variant]").Of("platform")
	f.Strings(&o.attach, "attach", "a", "Attach to stdin, stdout or stderr")
	f.Bool(&o.stdin, "interactive", "i", "Keep standard input open")
	f.Bool(&o.tty, "tty", "t", "Give the container a terminal")
	f.String(&o.cidfile, "cidfile", "", "Write the container's id to a file").Of("file")
	f.Strings(&o.env, "env", "e", "Set an environment variable")
	f.Strings(&o.envFiles, "env-file", "", "Read environment variables from a file").Of("file")
	f.Strings(&o.labels, "label", "l", "Set a label")
	f.Strings(&o.labelFile, "label-file", "", "Read labels from a file").Of("file")
	f.Strings(&o.annotations, "annotation", "", "Set an annotation for the runtime").Kind("map")
	f.Add("entrypoint", "", "string", "Replace the image's entrypoint (\"\" for none)", func(s string) error {
		o.entrypoint, o.entrypointSet = s, true
		return nil
	})
	f.String(&o.user, "user", "u", "User (name or id, [:group])")
	f.String(&o.workdir, "workdir", "w", "Working directory in the container")
	f.String(&o.hostname, "hostname", "h", "Host name in the container")
	f.String(&o.domainname, "domainname", "", "NIS domain name in the container")
	f.String(&o.stopSignal, "stop-signal", "", "Signal that stops the container").Of("signal")
	f.OptInt(&o.stopTimeout, "stop-timeout", "", "Seconds between the stop signal and SIGKILL")
	f.OptBool(&o.init, "init", "", "Run an init that forwards signals and reaps processes")
	f.String(&o.pull, "pull", "", "Pull the image: always, missing or never").Of("pull")
	f.Bool(&o.quiet, "quiet", "q", "Do not show the progress of a pull")
	o.declareHealth(f)
	o.declareNetwork(f)
	o.declareStorage(f)
	o.declareSecurity(f)
	o.declareLimits(f)
}

func (o *createFlags) declareHealth(f *command.FlagSet) {
	f.String(&o.health.cmd, "health-cmd", "", "Command that tells whether the container is healthy")
	f.Duration(&o.health.interval, "health-interval", "", "Time between two checks (default 30s)")
	f.Duration(&o.health.timeout, "health-timeout", "", "Time that a check may take (default 30s)")
	f.Int(&o.health.retries, "health-retries", "", "Failures in a row that make it unhealthy (default 3)")
	f.Duration(&o.health.startPeriod, "health-start-period", "", "Time to start in which failures do not count")
	f.Duration(&o.health.startInterval, "health-start-interval", "", "Time between two checks while it starts (default 5s)")
	f.Bool(&o.noHealthcheck, "no-healthcheck", "", "Switch the image's health check off")
	f.String(&o.restart, "restart", "", "When to start it again: no, always, unless-stopped, on-failure[:max]").Of("restart")
	f.Bool(&o.restartUnhealthy, "restart-unhealthy", "", "Restart the container when it becomes unhealthy")
	f.Bool(&o.autoRemove, "rm", "", "Remove the container and its anonymous volumes when it ends")
	f.String(&o.logDriver, "log-driver", "", "How output is kept: json-file, local, k8s-file, journald, syslog, fluentd, none").Of("logdriver")
	f.Strings(&o.logOpts, "log-opt", "", "Option of the log driver, such as max-size=10m")
}

func (o *createFlags) declareNetwork(f *command.FlagSet) {
	f.Strings(&o.networks, "network", "", "Connect to a network: a name, none, host, container:NAME, or\nname=NAME,alias=…,ip=…,ip6=…,mac-address=…,driver-opt=…,gw-priority=…").Kind("network").Of("network")
	f.Strings(&o.networks, "net", "", "").Hide()
	f.Strings(&o.aliases, "network-alias", "", "Another name of the container on its network")
	f.Strings(&o.aliases, "net-alias", "", "").Hide()
	f.String(&o.ip, "ip", "", "IPv4 address on the network")
	f.String(&o.ip6, "ip6", "", "IPv6 address on the network")
	f.Strings(&o.linkLocal, "link-local-ip", "", "Link-local address")
	f.String(&o.mac, "mac-address", "", "Hardware address of the interface")
	f.Strings(&o.links, "link", "", "Link to another container, NAME[:ALIAS]").Of("container")
	f.Strings(&o.ports, "publish", "p", "Publish a port: [[ip:][host]:]container[/proto]")
	f.Bool(&o.publishAll, "publish-all", "P", "Publish every exposed port at a free one of the host")
	f.Bool(&o.publishThrough, "publish-through", "", "Let published ports bypass the input rules of the host's firewall")
	f.Strings(&o.expose, "expose", "", "Expose a port or range")
	f.Strings(&o.dns, "dns", "", "Name server")
	f.Strings(&o.dnsOpts, "dns-option", "", "Option of the resolver")
	f.Strings(&o.dnsOpts, "dns-opt", "", "").Hide()
	f.Strings(&o.dnsSearch, "dns-search", "", "Search domain of the resolver")
	f.Strings(&o.addHost, "add-host", "", "Line for /etc/hosts, host:ip (ip may be host-gateway)")
}

func (o *createFlags) declareStorage(f *command.FlagSet) {
	f.Strings(&o.volumes, "volume", "v", "Mount a directory or volume: [source:]target[:options]").Of("file")
	f.Strings(&o.mounts, "mount", "", "Mount: type=bind|volume|tmpfs|image,source=…,target=…,readonly,…").Kind("mount")
	f.Strings(&o.tmpfs, "tmpfs", "", "Mount a tmpfs: target[:options]")
	f.Strings(&o.volumesFrom, "volumes-from", "", "Mount the volumes of another container, NAME[:ro|rw]").Of("container")
	f.String(&o.volumeDriver, "volume-driver", "", "Driver of volumes that -v makes")
	f.Strings(&o.storageOpts, "storage-opt", "", "Option of the storage, such as size=10G")
	f.Bool(&o.readOnly, "read-only", "", "Mount the root file system read-only")
	bytesFlag(f, &o.shmSize, "shm-size", "", "Size of /dev/shm")
	f.Strings(&o.devices, "device", "", "Give a device of the host: host[:container][:rwm], or a CDI name").Of("file")
	f.Strings(&o.deviceRules, "device-cgroup-rule", "", "Rule for devices, 'c 42:* rmw'")
	f.Add("gpus", "", "gpu-request", "GPUs to give: all, a number, or device=…", func(s string) error {
		r, err := notation.GPUs(s)
		o.gpus = append(o.gpus, r)
		return err
	})
	for _, k := range []api.SecretKind{api.KindSecret, api.KindConfig} {
		f.Add(string(k), "", string(k), "Give a "+string(k)+" as a file: NAME[,target=…][,uid=…][,gid=…][,mode=…]", func(s string) error {
			r, err := api.ParseSecretRef(k, s)
			o.secrets = append(o.secrets, r)
			return err
		})
	}
	f.Bool(&o.useAPISocket, "use-api-socket", "", "Give the container the engine's socket (it then rules the host)")
}

func (o *createFlags) declareSecurity(f *command.FlagSet) {
	f.Bool(&o.privileged, "privileged", "", "Give the container all that the host's root may do")
	f.Strings(&o.capAdd, "cap-add", "", "Add a Linux capability").Of("capability")
	f.Strings(&o.capDrop, "cap-drop", "", "Drop a Linux capability").Of("capability")
	f.Strings(&o.groupAdd, "group-add", "", "Another group of the user")
	f.Strings(&o.securityOpt, "security-opt", "", "seccomp=FILE|unconfined, apparmor=…, label=…, no-new-privileges,\nsystempaths=unconfined")
	f.String(&o.ipc, "ipc", "", "IPC namespace: private, shareable, host, none, container:NAME")
	f.String(&o.pid, "pid", "", "PID namespace: host, container:NAME")
	f.String(&o.uts, "uts", "", "UTS namespace: host")
	f.String(&o.userns, "userns", "", "User namespace: host, auto (a range of ids of its own)")
	f.String(&o.cgroupns, "cgroupns", "", "Cgroup namespace: private, host")
	f.String(&o.isolation, "isolation", "", "Isolation (Windows containers)")
	f.String(&o.cgroupParent, "cgroup-parent", "", "Parent cgroup")
	f.String(&o.runtime, "runtime", "", "OCI runtime to run the container with")
	f.Strings(&o.sysctls, "sysctl", "", "Kernel parameter of a namespace").Kind("map")
}

func (o *createFlags) declareLimits(f *command.FlagSet) {
	o.memorySwappiness = -1
	declareResources(f, &o.res)
	f.Add("memory-swappiness", "", "int", "How readily memory is swapped, 0 to 100", func(s string) error {
		o.memorySwappinessSet = true
		return parseInt(s, &o.memorySwappiness)
	})
	f.Bool(&o.oomKillDisable, "oom-kill-disable", "", "Do not kill when memory runs out")
	f.Int(&o.oomScoreAdj, "oom-score-adj", "", "Preference for the kernel's out-of-memory killer, -1000 to 1000")
	f.Add("ulimit", "", "ulimit", "Resource limit, name=soft[:hard]", func(s string) error {
		u, err := notation.Ulimit(s)
		o.ulimits = append(o.ulimits, u)
		return err
	})
	weight := func(list *[]*blkiodev.WeightDevice) func(string) error {
		return func(s string) error {
			w, err := notation.WeightDevice(s)
			*list = append(*list, w)
			return err
		}
	}
	rate := func(list *[]*blkiodev.ThrottleDevice, read func(string) (*blkiodev.ThrottleDevice, error)) func(string) error {
		return func(s string) error {
			d, err := read(s)
			*list = append(*list, d)
			return err
		}
	}
	r := &o.res
	f.Add("blkio-weight-device", "", "list", "Weight of block IO at a device, /dev/NAME:weight", weight(&r.BlkioWeightDevice))
	f.Add("device-read-bps", "", "list", "Limit of reading, /dev/NAME:bytes a second", rate(&r.BlkioDeviceReadBps, notation.ThrottleBytes))
	f.Add("device-write-bps", "", "list", "Limit of writing, /dev/NAME:bytes a second", rate(&r.BlkioDeviceWriteBps, notation.ThrottleBytes))
	f.Add("device-read-iops", "", "list", "Limit of reads, /dev/NAME:operations a second", rate(&r.BlkioDeviceReadIOps, notation.ThrottleOps))
	f.Add("device-write-iops", "", "list", "Limit of writes, /dev/NAME:operations a second", rate(&r.BlkioDeviceWriteIOps, notation.ThrottleOps))
	f.Int64(&r.CPUCount, "cpu-count", "", "").Hide()
	f.Int64(&r.CPUPercent, "cpu-percent", "", "").Hide()
}

// declareResources are the limits that update can change too.
func declareResources(f *command.FlagSet, r *container.Resources) {
	bytesFlag(f, &r.Memory, "memory", "m", "Limit of memory")
	bytesFlag(f, &r.MemoryReservation, "memory-reservation", "", "Memory that is reclaimed last (soft limit)")
	f.Add("memory-swap", "", "bytes", "Limit of memory and swap together; -1 for no limit", func(s string) (err error) {
		r.MemorySwap, err = notation.BytesOrUnlimited(s)
		return err
	})
	f.Add("cpus", "", "decimal", "Number of processors, such as 1.5", func(s string) (err error) {
		r.NanoCPUs, err = notation.CPUs(s)
		return err
	})
	f.Int64(&r.CPUShares, "cpu-shares", "c", "Weight of CPU time against other containers")
	f.Int64(&r.CPUPeriod, "cpu-period", "", "Period of the CPU limit in microseconds")
	f.Int64(&r.CPUQuota, "cpu-quota", "", "CPU time in each period in microseconds")
	f.Int64(&r.CPURealtimePeriod, "cpu-rt-period", "", "Period of the real-time limit in microseconds")
	f.Int64(&r.CPURealtimeRuntime, "cpu-rt-runtime", "", "Real-time CPU time in each period in microseconds")
	f.String(&r.CpusetCpus, "cpuset-cpus", "", "Processors to run on, 0-3 or 0,1")
	f.String(&r.CpusetMems, "cpuset-mems", "", "Memory nodes to use, 0-3 or 0,1")
	f.Add("pids-limit", "", "int", "Limit of processes and threads; -1 for no limit", func(s string) error {
		var n int64
		err := parseInt(s, &n)
		r.PidsLimit = &n
		return err
	})
	f.Add("blkio-weight", "", "uint16", "Weight of block IO, 10 to 1000; 0 for none", func(s string) error {
		var n int64
		if err := parseInt(s, &n); err != nil || n < 0 || n > 1000 || n > 0 && n < 10 {
			return fmt.Errorf("%q is not from 10 to 1000", s)
		}
		r.BlkioWeight = uint16(n)
		return nil
	})
}
