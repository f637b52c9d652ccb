package vmwire

// What the driver for WSL2 and the programs in its distribution agree on: the distribution is a tree
// of files below Microsoft's kernel and first process, and our first process one program in it.
const (
	// DistributionProgram is in every distribution, under this path forever: one of another version is
	// asked to replace itself.
	DistributionProgram = "/system/bin/cloudos-init"

	// DistributionRun DIGEST [DistributionFresh] runs the machine of the image whose root has the digest, and ends with it;
	// the second says that the distribution was just made of it.
	DistributionRun   = "run"
	DistributionFresh = "fresh"
	// DistributionReplace DIGEST puts the image's programs, which come over standard input as a packed tar,
	// in the place of those that are there.
	DistributionReplace = "replace"
	// DistributionBridge joins standard input and output with the port of the machine that runs.
	DistributionBridge = "bridge"
	// DistributionAlive says whether a machine runs: by ending with 0, or with DistributionDead.
	DistributionAlive = "alive"

	// DistributionWait ends when the machine has ended: with 0 when that was in order, with 1 when it was not; or when its
	// standard input does.
	DistributionWait = "wait"
	// DistributionStarted is a line on the standard output of DistributionRun: the port can be dialled.
	DistributionStarted = "cloudos-init: the machine starts"

	// How DistributionProgram ends, besides 0 and 1.
	DistributionOther = 75 // run: the programs are those of another image
	DistributionRuns  = 73 // run, replace: a machine runs already
	DistributionDead  = 69 // alive, bridge: none does
)

// Tar is the format of a root that is a tree of files, packed with gzip: of images in the format wsl.
const Tar = "tar+gzip"

// Places in the tar of a distribution.
const (
	// DistributionSlots holds one folder for each image's programs; DistributionSystem is a link to one of them.
	DistributionSlots  = "slots"
	DistributionSystem = "system"
	// DistributionFirst is the slot that the tar has.
	DistributionFirst = "a"
	// DistributionData is what is kept, whatever image there is.
	DistributionData = "data"
	// DistributionDrives is where WSL mounts Windows' drives: /mnt/c.
	DistributionDrives = "/mnt"
)
