// Package model loads Compose projects: files, profiles, environment, labels and
// the hashes that tell whether something differs from what runs. Vocabulary: a
// project is a set of services; a service has containers, numbered from 1; a
// one-off container was made by "run". It speaks to no engine. The packages
// beside it import it.
package model

// Labels are Docker Compose's, so that projects are interchangeable with it.
const (
	LabelProject     = "com.docker.compose.project"
	LabelService     = "com.docker.compose.service"
	LabelHash        = "com.docker.compose.config-hash"
	LabelNumber      = "com.docker.compose.container-number"
	LabelVolume      = "com.docker.compose.volume"
	LabelNetwork     = "com.docker.compose.network"
	LabelWorkingDir  = "com.docker.compose.project.working_dir"
	LabelConfigFiles = "com.docker.compose.project.config_files"
	LabelEnvFile     = "com.docker.compose.project.environment_file"
	LabelOneOff      = "com.docker.compose.oneoff"
	LabelSlug        = "com.docker.compose.slug"
	LabelImage       = "com.docker.compose.image"
	LabelDependsOn   = "com.docker.compose.depends_on"
	LabelVersion     = "com.docker.compose.version"
	LabelReplace     = "com.docker.compose.replace"

	// LabelConfigs is ours: the digest of the configs that are copied into a
	// container, which Docker Compose's hash does not see.
	LabelConfigs = "io.servin.compose.configs"
)

// Version is the release of Docker Compose whose behaviour and labels we follow.
const Version = "2.40.3"
